"""BibTeX of the papers behind the methods, and of ffnkit."""

from __future__ import annotations

MLP_FUSION = """@inproceedings{wei2023mlpfusion,
  title     = {{NTK}-approximating {MLP} Fusion for Efficient Language Model Fine-tuning},
  author    = {Wei, Tianxin and Guo, Zeming and Chen, Yifan and He, Jingrui},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning},
  year      = {2023},
  note      = {arXiv:2307.08941}
}"""
MLP_FUSION_MOE = """@misc{ai2025mlpfusion,
  title         = {{MLP} Fusion: Towards Efficient Fine-tuning of Dense and Mixture-of-Experts Language Models},
  author        = {Ai, Mengting and Wei, Tianxin and Chen, Yifan and Guo, Zeming and He, Jingrui},
  year          = {2025},
  eprint        = {2307.08941v3},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG}
}"""
FFNKIT = """@software{ffnkit,
  title  = {ffnkit: narrower, shared and cheaply tuned feed-forward blocks for {Hugging Face} models},
  author = {{The ffnkit maintainers}}
}"""
OF_METHOD = {"fusion": (MLP_FUSION, MLP_FUSION_MOE)}
