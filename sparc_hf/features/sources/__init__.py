"""Where images, texts and labels come from: folders, tables, COCO, Open Images, ImageNet."""
