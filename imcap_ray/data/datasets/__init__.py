"""Captioned images in any of the formats people have -> one table. Knows no model and no pixel.

dataset        the table itself, and how a reader fills it
detection      recognises a format by looking
fields         fields as people name them
text_tables    Flickr8k, Flickr30k, Kaggle's forms, CSV
coco_json      Karpathy's and COCO's JSON, lists of records
image_folders  Hugging Face's metadata files, images with .txt next to them
parquet        Parquet
webdataset     tars
"""

from imcap_ray.data.datasets.dataset import DATASET_SCHEMA, SPLITS, TEST, TRAIN, VALIDATION, CaptionedImages, split_of
from imcap_ray.data.datasets.detection import load_dataset

__all__ = ["DATASET_SCHEMA", "SPLITS", "TEST", "TRAIN", "VALIDATION", "CaptionedImages", "load_dataset", "split_of"]
