"""BibTeX of the papers behind the methods, and of ffnkit. ``CITATION.cff`` names the same papers."""

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
PURSUIT = """@article{tropp2006simultaneous,
  title   = {Algorithms for Simultaneous Sparse Approximation. Part {I}: Greedy Pursuit},
  author  = {Tropp, Joel A. and Gilbert, Anna C. and Strauss, Martin J.},
  journal = {Signal Processing},
  volume  = {86},
  number  = {3},
  pages   = {572--588},
  year    = {2006}
}"""
BRAIN_COMPRESSION = """@inproceedings{frantar2022optimal,
  title     = {Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning},
  author    = {Frantar, Elias and Alistarh, Dan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022},
  note      = {arXiv:2208.11580}
}"""
TWO_SAMPLE = """@article{gretton2012kernel,
  title   = {A Kernel Two-Sample Test},
  author  = {Gretton, Arthur and Borgwardt, Karsten M. and Rasch, Malte J. and Sch{\\"o}lkopf, Bernhard and Smola,
             Alexander},
  journal = {Journal of Machine Learning Research},
  volume  = {13},
  pages   = {723--773},
  year    = {2012}
}"""
LOW_RANK = """@article{eckart1936approximation,
  title   = {The Approximation of One Matrix by Another of Lower Rank},
  author  = {Eckart, Carl and Young, Gale},
  journal = {Psychometrika},
  volume  = {1},
  number  = {3},
  pages   = {211--218},
  year    = {1936}
}"""
IMPORTANCE = """@inproceedings{molchanov2019importance,
  title     = {Importance Estimation for Neural Network Pruning},
  author    = {Molchanov, Pavlo and Mallya, Arun and Tyree, Stephen and Frosio, Iuri and Kautz, Jan},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2019},
  note      = {arXiv:1906.10771}
}"""
MINITRON = """@misc{muralidharan2024minitron,
  title         = {Compact Language Models via Pruning and Knowledge Distillation},
  author        = {Muralidharan, Saurav and Sreenivas, Sharath Turuvekere and Joshi, Raviraj and Chochowski, Marcin and
                   Patwary, Mostofa and Shoeybi, Mohammad and Catanzaro, Bryan and Kautz, Jan and Molchanov, Pavlo},
  year          = {2024},
  eprint        = {2407.14679},
  archivePrefix = {arXiv}
}"""
CONNECTIONS = """@inproceedings{han2015learning,
  title     = {Learning both Weights and Connections for Efficient Neural Networks},
  author    = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2015},
  note      = {arXiv:1506.02626}
}"""
DSEE = """@inproceedings{chen2023dsee,
  title     = {{DSEE}: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models},
  author    = {Chen, Xuxi and Chen, Tianlong and Chen, Weizhu and Awadallah, Ahmed Hassan and Wang, Zhangyang and
               Cheng, Yu},
  booktitle = {Proceedings of the 61st Annual Meeting of the Association for Computational Linguistics},
  year      = {2023},
  note      = {arXiv:2111.00160}
}"""
WANDA = """@inproceedings{sun2024wanda,
  title     = {A Simple and Effective Pruning Approach for Large Language Models},
  author    = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  note      = {arXiv:2306.11695}
}"""
MERGING = """@misc{verma2025merging,
  title         = {Merging Feed-Forward Sublayers for Compressed Transformers},
  author        = {Verma, Neha and Murray, Kenton and Duh, Kevin},
  year          = {2025},
  eprint        = {2501.06126},
  archivePrefix = {arXiv}
}"""
CONVOLUTIONAL = """@inproceedings{molchanov2017pruning,
  title     = {Pruning Convolutional Neural Networks for Resource Efficient Inference},
  author    = {Molchanov, Pavlo and Tyree, Stephen and Karras, Tero and Aila, Timo and Kautz, Jan},
  booktitle = {International Conference on Learning Representations},
  year      = {2017},
  note      = {arXiv:1611.06440}
}"""
SPARSEGRAD = """@inproceedings{chekalina2024sparsegrad,
  title     = {{SparseGrad}: A Selective Method for Efficient Fine-tuning of {MLP} Layers},
  author    = {Chekalina, Viktoriia and Rudenko, Anna and Mezentsev, Gleb and Mikhalev, Aleksandr and Panchenko,
               Alexander and Oseledets, Ivan},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  year      = {2024},
  note      = {arXiv:2410.07383}
}"""
MODEGPT = """@inproceedings{lin2025modegpt,
  title     = {{MoDeGPT}: Modular Decomposition for Large Language Model Compression},
  author    = {Lin, Chi-Heng and Gao, Shangqian and Smith, James Seale and Patel, Abhishek and Tuli, Shikhar and Shen,
               Yilin and Jin, Hongxia and Hsu, Yen-Chang},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2408.09632}
}"""
SLIMGPT = """@inproceedings{ling2024slimgpt,
  title     = {{SlimGPT}: Layer-wise Structured Pruning for Large Language Models},
  author    = {Ling, Gui and Wang, Ziyang and Yan, Yuliang and Liu, Qingwen},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  note      = {arXiv:2412.18110}
}"""
ZIPLM = """@inproceedings{kurtic2023ziplm,
  title     = {{ZipLM}: Inference-Aware Structured Pruning of Language Models},
  author    = {Kurti{\\'c}, Eldar and Frantar, Elias and Alistarh, Dan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  note      = {arXiv:2302.04089}
}"""
FLAP = """@inproceedings{an2024flap,
  title     = {Fluctuation-based Adaptive Structured Pruning for Large Language Models},
  author    = {An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2024},
  note      = {arXiv:2312.11983}
}"""
SVD_LLM = """@inproceedings{wang2025svdllm,
  title     = {{SVD-LLM}: Truncation-aware Singular Value Decomposition for Large Language Model Compression},
  author    = {Wang, Xin and Zheng, Yu and Wan, Zhongwei and Zhang, Mi},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2403.07378}
}"""
GRAIL = """@inproceedings{tang2026grail,
  title     = {{GRAIL}: Post-hoc Compensation by Linear Reconstruction for Compressed Networks},
  author    = {Tang, Wenwu and Wang, Dong and Thiele, Lothar and Saukh, Olga},
  booktitle = {Conference on Parsimony and Learning},
  year      = {2026},
  note      = {arXiv:2602.23795}
}"""
LORA = """@inproceedings{hu2022lora,
  title     = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean
               and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  note      = {arXiv:2106.09685}
}"""
SHIRA = """@inproceedings{bhardwaj2024shira,
  title     = {Sparse High Rank Adapters},
  author    = {Bhardwaj, Kartikeya and Pandey, Nilesh Prasad and Priyadarshi, Sweta and Ganapathy, Viswanath and
               Kadambi, Shreya and Esteves, Rafael and Borse, Shubhankar and Whatmough, Paul and Garrepalli, Risheek and
               Van Baalen, Mart and Teague, Harris and Nagel, Markus},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  note      = {arXiv:2406.13175}
}"""
MEPROP = """@inproceedings{sun2017meprop,
  title     = {{meProp}: Sparsified Back Propagation for Accelerated Deep Learning with Reduced Overfitting},
  author    = {Sun, Xu and Ren, Xuancheng and Ma, Shuming and Wang, Houfeng},
  booktitle = {Proceedings of the 34th International Conference on Machine Learning},
  year      = {2017},
  note      = {arXiv:1706.06197}
}"""
BITFIT = """@inproceedings{benzaken2022bitfit,
  title     = {{BitFit}: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models},
  author    = {Ben Zaken, Elad and Ravfogel, Shauli and Goldberg, Yoav},
  booktitle = {Proceedings of the 60th Annual Meeting of the Association for Computational Linguistics},
  year      = {2022},
  note      = {arXiv:2106.10199}
}"""
HOULSBY = """@inproceedings{houlsby2019parameter,
  title     = {Parameter-Efficient Transfer Learning for {NLP}},
  author    = {Houlsby, Neil and Giurgiu, Andrei and Jastrzebski, Stanislaw and Morrone, Bruna and de Laroussilhe,
               Quentin and Gesmundo, Andrea and Attariyan, Mona and Gelly, Sylvain},
  booktitle = {Proceedings of the 36th International Conference on Machine Learning},
  year      = {2019},
  note      = {arXiv:1902.00751}
}"""
PFEIFFER = """@inproceedings{pfeiffer2021adapterfusion,
  title     = {{AdapterFusion}: Non-Destructive Task Composition for Transfer Learning},
  author    = {Pfeiffer, Jonas and Kamath, Aishwarya and R{\\"u}ckl{\\'e}, Andreas and Cho, Kyunghyun and Gurevych,
               Iryna},
  booktitle = {Proceedings of the 16th Conference of the European Chapter of the Association for Computational
               Linguistics},
  year      = {2021},
  note      = {arXiv:2005.00247}
}"""
PREFIX = """@inproceedings{li2021prefix,
  title     = {Prefix-Tuning: Optimizing Continuous Prompts for Generation},
  author    = {Li, Xiang Lisa and Liang, Percy},
  booktitle = {Proceedings of the 59th Annual Meeting of the Association for Computational Linguistics},
  year      = {2021},
  note      = {arXiv:2101.00190}
}"""
P_TUNING = """@inproceedings{liu2022ptuning,
  title     = {{P-Tuning} v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks},
  author    = {Liu, Xiao and Ji, Kaixuan and Fu, Yicheng and Tam, Weng Lam and Du, Zhengxiao and Yang, Zhilin and Tang,
               Jie},
  booktitle = {Proceedings of the 60th Annual Meeting of the Association for Computational Linguistics},
  year      = {2022},
  note      = {arXiv:2110.07602}
}"""
FFNKIT = """@software{ffnkit,
  title  = {ffnkit: narrower, shared and cheaply tuned feed-forward blocks for {Hugging Face} models},
  author = {{The ffnkit maintainers}}
}"""
OF_METHOD: dict[str, tuple[str, ...]] = {
    "fusion": (MLP_FUSION, MLP_FUSION_MOE),
    "calibrated-fusion": (MLP_FUSION, PURSUIT, BRAIN_COMPRESSION, MODEGPT, GRAIL),
    "clustering": (MLP_FUSION,),
    "sketch": (MLP_FUSION,),
    "svd": (MLP_FUSION, LOW_RANK, SVD_LLM),
    "mmd": (MLP_FUSION, TWO_SAMPLE),
    "random": (MLP_FUSION,),
    "magnitude": (MLP_FUSION,),
    "importance": (IMPORTANCE, MINITRON),
    "flap": (FLAP,),
    "modegpt": (MODEGPT,),
    "obs": (SLIMGPT, ZIPLM, BRAIN_COMPRESSION),
    "reinit": (MLP_FUSION,),
    "unstructured": (MLP_FUSION, CONNECTIONS),
    "prune": (DSEE, WANDA, CONNECTIONS),
    "heads": (DSEE,),
    "structured": (DSEE, CONVOLUTIONAL),
    "merging": (MERGING,),
    "calibrated-merging": (MERGING, PURSUIT, GRAIL),
    "ffn-drop": (MERGING,),
    "layer-drop": (MERGING,),
    "combined": (),
    "sparsegrad": (SPARSEGRAD,),
    "dsee": (DSEE,),
}
"""What a method builds on, by its name."""
OF_TUNER: dict[str, tuple[str, ...]] = {
    "full": (),
    "ffn": (),
    "head": (),
    "bitfit": (BITFIT,),
    "bottleneck": (HOULSBY, PFEIFFER),
    "prefix": (PREFIX, P_TUNING),
    "lora": (LORA,),
    "sparsegrad": OF_METHOD["sparsegrad"],
    "dsee": OF_METHOD["dsee"],
    "mask": (SHIRA, SPARSEGRAD),
    "meprop": (MEPROP, SPARSEGRAD),
    "combined": (),
}
"""What a tuner builds on, by its name; nothing: no paper describes it (it is ours, or training as anyone does it)."""
OWN = {
    "calibrated-fusion": "The method calibrated-fusion has no paper of its own; it builds on what is cited here.",
    "calibrated-merging": "The method calibrated-merging has no paper of its own; it builds on what is cited here.",
    "combined": "The method combined has no paper of its own; cite the methods that it combines.",
}
"""Said beside the citations of a method that no paper describes."""
