"""`imcap train` as a program for Ray Jobs, with the same arguments. Paths must be absolute, or URIs.

ray job submit --working-dir . -- python jobs/train.py s3://bucket/flickr8k s3://bucket/runs/mine
"""

import sys

from imcap_ray.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
