"""Published figures, shown beside ours: of BLIP-2 (arXiv 2301.12597, tables 2 to 5) unless the name says otherwise.

They hold for the official test data and for the published checkpoints. All are percents, CIDEr up to 1000.
"""

OFFICIAL_SIZE = {  # samples of the official test data: images, of question answering questions
    "coco_caption": 5000,
    "nocaps": 4500,
    "vqav2": 107394,
    "okvqa": 5046,
    "gqa": 12578,
    "flickr30k_retrieval": 1000,
    "coco_retrieval": 5000,
    "flickr8k_retrieval": 1000,
    "flickr8k_caption": 1000,
}

PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "coco_caption": {
        "ViT-g OPT-2.7B, fine-tuned": {"Bleu_4": 43.7, "CIDEr": 145.8},
        "ViT-g OPT-6.7B, fine-tuned": {"Bleu_4": 43.5, "CIDEr": 145.2},
        "ViT-g FlanT5-XL, fine-tuned": {"Bleu_4": 42.4, "CIDEr": 144.5},
        "mmpretrain, OPT-2.7B, zero-shot": {"Bleu_4": 32.9, "CIDEr": 111.1},
    },
    "nocaps": {
        "ViT-g OPT-2.7B": {"CIDEr": 119.7},
        "ViT-g OPT-6.7B": {"CIDEr": 121.0},
        "ViT-g FlanT5-XL": {"CIDEr": 121.6},
    },
    "vqav2": {
        "ViT-g OPT-2.7B, zero-shot, test-dev": {"vqa_accuracy": 52.3},
        "ViT-g FlanT5-XL, zero-shot, test-dev": {"vqa_accuracy": 63.0},
        "ViT-g FlanT5-XXL, zero-shot, test-dev": {"vqa_accuracy": 65.0},
        "ViT-g OPT-2.7B, fine-tuned, test-dev": {"vqa_accuracy": 81.59},
        "Flamingo80B, zero-shot, test-dev": {"vqa_accuracy": 56.3},
        "mmpretrain, OPT-2.7B, zero-shot, val": {"vqa_accuracy": 53.5},
    },
    "okvqa": {
        "ViT-g OPT-2.7B, zero-shot": {"vqa_accuracy": 31.7},
        "ViT-g FlanT5-XL, zero-shot": {"vqa_accuracy": 40.7},
        "ViT-g FlanT5-XXL, zero-shot": {"vqa_accuracy": 45.9},
        "Flamingo80B, zero-shot": {"vqa_accuracy": 50.6},
    },
    "gqa": {
        "ViT-g OPT-2.7B, zero-shot": {"exact_match": 34.6},
        "ViT-g FlanT5-XL, zero-shot": {"exact_match": 44.2},
        "ViT-g FlanT5-XXL, zero-shot": {"exact_match": 44.7},
    },
    "flickr30k_retrieval": {
        "ViT-g, zero-shot": {"i2t_r1": 97.6, "t2i_r1": 89.7},
        "ViT-L, zero-shot": {"i2t_r1": 96.9, "t2i_r1": 88.6},
    },
    "coco_retrieval": {
        "ViT-g, fine-tuned": {"i2t_r1": 85.4, "t2i_r1": 68.3},
        "ViT-L, fine-tuned": {"i2t_r1": 83.5, "t2i_r1": 66.3},
    },
    "flickr8k_retrieval": {
        "CCA on VGG-19 and word2vec (Klein et al. 2015), test": {"i2t_r1": 22.6, "t2i_r1": 19.1},
    },
    "flickr8k_caption": {"Show, Attend and Tell (Xu et al. 2015), test": {"Bleu_4": 21.3}},
    "imagenet": {},
    "daquar": {},
}
