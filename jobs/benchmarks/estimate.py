"""Hours and cost of a run that is too large to be measured, from rates measured on one core and one GPU.

python jobs/benchmarks/estimate.py --decode 320 --model 28
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
from shared import json_option, show


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimate a run of many images on a cluster from rates that were measured on one core and one GPU.

    CPUs decode and GPUs caption at the same time, so the slower of the two counts:

        images/s = share x min(cpus x decode, gpus x model)

    Without GPUs the same cores do both for an image, one after the other:

        images/s = share x cpus / (1 / decode + 1 / model)

    `share` is the part of that limit which a run reaches; `imcap bench` measures it. Images are independent, so the
    rate of a cluster is the sum of its nodes' rates, as long as:

    - One process lists the input before work begins. A store answers with 1,000 names at a time. The names in a table
      are there already, which takes a thousandth of the time.
    - Pixels travel from the node that decodes to the one that captions, if these differ: 3 x S x S bytes an image, with
      S the model's image size. Beyond the network's bandwidth, give GPU nodes enough CPUs to decode for themselves.
    - One actor remembers the hashes of all images, in 29 bits each. When a run is resumed, one process holds the ids
      of all finished images, in 8 bytes each. At 10^10 images neither fits.
    - Ray's driver starts a task for every 64 images, which takes 0.25 ms of CPU an image (scale.py, a million images on
      an Intel Xeon). So one driver feeds some 4,000 images a second. Beyond that, split the input into several runs.
    """

    images: int
    cpus: int
    gpus: int
    decode: float
    """Images per second that one core decodes."""
    model: float
    """Images per second of one GPU, or of one core without GPUs."""
    share: float
    cpu_price: float
    """Price of a core for an hour."""
    gpu_price: float
    """Price of a GPU for an hour."""
    listing: float
    """Files listed per second."""
    image_size: int

    @property
    def images_per_second(self) -> float:
        """Images per second in the middle of the run."""
        if self.gpus:
            return self.share * min(self.cpus * self.decode, self.gpus * self.model)
        return self.share * self.cpus / (1 / self.decode + 1 / self.model)

    def to_dict(self) -> dict[str, Any]:
        """The results, ready for JSON."""
        hours = self.images / self.images_per_second / 3600
        listing_hours = self.images / self.listing / 3600
        price = self.cpus * self.cpu_price + self.gpus * self.gpu_price
        return {
            "images_per_second": round(self.images_per_second, 1),
            "bound": "decoding" if self.gpus and self.cpus * self.decode < self.gpus * self.model else "the model",
            "hours": round(hours, 2),
            "listing_hours": round(listing_hours, 2),
            "cost": round((hours + listing_hours) * price, 2),
            "cost_per_100_million": round((hours + listing_hours) * price * 1e8 / self.images, 2),
            "pixels_megabytes_per_second": round(self.images_per_second * 3 * self.image_size**2 / 1e6, 1),
            "index_megabytes": round(self.images * 29 / 8 / 1e6, 1),
            "resumed_ids_megabytes": round(self.images * 8 / 1e6, 1),
        }


@click.command(help=Estimate.__doc__)
@click.option("--images", default=100_000_000, show_default=True)
@click.option("--cpus", default=64, show_default=True, help="Cores of the cluster.")
@click.option("--gpus", default=0, show_default=True, help="GPUs of the cluster.")
@click.option("--decode", required=True, type=float, help="Images per second that one core decodes.")
@click.option("--model", required=True, type=float, help="Images per second of one GPU, or of one core without GPUs.")
@click.option("--share", default=0.9, show_default=True, help="Share of the limit that a run reaches.")
@click.option("--cpu-price", default=0.0, help="Price of a core for an hour, in any currency.")
@click.option("--gpu-price", default=0.0, help="Price of a GPU for an hour.")
@click.option("--listing", default=10_000.0, show_default=True, help="Files listed per second.")
@click.option("--image-size", default=224, show_default=True, help="Pixels a side that the model sees.")
@json_option
def main(as_json: bool, **values: Any) -> None:
    """Show the results of `Estimate`."""
    if min(values["cpus"], values["decode"], values["model"], values["share"], values["listing"]) <= 0:
        raise click.UsageError("--cpus, --decode, --model, --share and --listing must be above 0")
    show(Estimate(**values).to_dict(), as_json)


if __name__ == "__main__":
    main()
