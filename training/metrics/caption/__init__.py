"""Caption metrics of COCO."""
