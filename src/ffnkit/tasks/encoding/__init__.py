"""Token ids of texts: by the tokenizer, prompts and targets as sequences, padded and packed batches."""
