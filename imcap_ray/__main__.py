"""`python -m imcap_ray` is `imcap`."""

from imcap_ray.cli import main

main()
