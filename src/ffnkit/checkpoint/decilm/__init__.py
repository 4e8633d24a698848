"""Code that travels with a checkpoint of LLaMA shape whose FFNs differ in width, for plain transformers and vLLM."""
