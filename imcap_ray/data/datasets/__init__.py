"""Captioned images in any of the formats people have -> one table. Knows no model and no pixel.

table        the table itself, and how a reader fills it
loading      recognises a format by looking
records      fields as people name them
encodings    bytes -> text, whatever program wrote them
text_files   Flickr8k, Flickr30k, Kaggle's forms, CSV
json_files   Karpathy's and COCO's JSON, lists of records
folders      Hugging Face's metadata files, images with .txt beside them
tables       Parquet
webdataset   tars
"""

from imcap_ray.data.datasets.dataset import DATASET_SCHEMA, SPLITS, TEST, TRAIN, VALIDATION, CaptionedImages, split_of
from imcap_ray.data.datasets.detection import load_dataset

__all__ = ["DATASET_SCHEMA", "SPLITS", "TEST", "TRAIN", "VALIDATION", "CaptionedImages", "load_dataset", "split_of"]
