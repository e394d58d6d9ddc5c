"""Captioned images in any of the formats people have -> one table. Knows no model and no pixel.

`dataset` is the table and the means by which a reader fills it, `detection` lists the formats and recognises one by its
files, `fields` knows the usual names of fields. Every other module reads one format.
"""

from imcap_ray.data.datasets.dataset import DATASET_SCHEMA, SPLITS, TEST, TRAIN, VALIDATION, CaptionedImages, split_of
from imcap_ray.data.datasets.detection import load_dataset

__all__ = ["DATASET_SCHEMA", "SPLITS", "TEST", "TRAIN", "VALIDATION", "CaptionedImages", "load_dataset", "split_of"]
