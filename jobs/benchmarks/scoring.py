"""Time and memory of `imcap evaluate` over many captions.

python jobs/benchmarks/scoring.py --images 1000000
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from shared import json_option, show

NUM_WORDS = 30_000
WORDS_OF_A_SCENE = 8
CAPTIONS_AT_A_TIME = 20_000
CAPTIONS_SCHEMA = pa.schema([("image_id", pa.string()), ("caption", pa.string()), ("confidence", pa.float32())])
REFERENCES_SCHEMA = pa.schema([("image_id", pa.string()), ("split", pa.string()), ("captions", pa.list_(pa.string()))])


@click.command()
@click.option("--images", default=100_000, show_default=True)
@click.option("--references", default=5, show_default=True, help="References of each image.")
@click.option("--against", is_flag=True, help="Compare with a second set of captions too.")
@json_option
def main(images: int, references: int, against: bool, as_json: bool) -> None:
    """Seconds and peak memory of `imcap evaluate` on generated captions, in a process of its own.

    Words are drawn with Zipf's frequencies, two of three from the scene of their image; a caption has 7 to 15 words.
    Real captions repeat themselves more, so they have fewer distinct n-grams, which are what takes memory.
    """
    with tempfile.TemporaryDirectory(prefix="imcap-evaluate-") as folder:
        write_generated_captions(Path(folder), images, references)
        command = [sys.executable, "-m", "imcap_ray", "evaluate", "captions.parquet", "references.parquet", "--json"]
        command += ["--save", "scores", *(["--against", "others.parquet"] if against else [])]
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if status:
            raise click.ClickException(f"imcap evaluate ended with status {os.waitstatus_to_exitcode(status)}")
    scores = json.loads(output)["scores"]
    show(
        {
            "images": images,
            "references_per_image": references,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_gib": round(usage.ru_maxrss / 2**20, 2),
            "captions_per_second": round(images / seconds),
            "cider_d": round(scores["cider_d"], 4),
            "bleu_4": round(scores["bleu_4"], 4),
        },
        as_json,
    )


class _Sentences:
    """Generates sentences about scenes of a few words."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        lengths = (self.generator.integers(1, 9) for _ in range(NUM_WORDS))
        self._words = pa.array(sorted({"".join(self.generator.choice(letters, size=length)) for length in lengths}))
        frequencies = 1 / (10 + self.generator.permutation(len(self._words)))
        self._thresholds = np.cumsum(frequencies / frequencies.sum())

    def draw_words(self, shape: Any) -> np.ndarray[Any, Any]:
        positions = np.searchsorted(self._thresholds, self.generator.random(shape))
        return np.minimum(positions, len(self._words) - 1).astype(np.int32)

    def draw_sentences(self, scenes: np.ndarray[Any, Any]) -> pa.Array:
        lengths = self.generator.integers(7, 16, size=len(scenes))
        image = np.repeat(np.arange(len(scenes)), lengths)
        of_scene = scenes[image, self.generator.integers(scenes.shape[1], size=len(image))]
        drawn = np.where(self.generator.random(len(image)) < 2 / 3, of_scene, self.draw_words(len(image)))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pc.binary_join(pa.ListArray.from_arrays(offsets, self._words.take(pa.array(drawn))), " ")


def write_generated_captions(folder: Path, num_images: int, references: int) -> None:
    """Write captions.parquet, others.parquet and references.parquet, all of the same images."""
    sentences = _Sentences()
    with (
        pq.ParquetWriter(folder / "captions.parquet", CAPTIONS_SCHEMA) as captions,
        pq.ParquetWriter(folder / "others.parquet", CAPTIONS_SCHEMA) as others,
        pq.ParquetWriter(folder / "references.parquet", REFERENCES_SCHEMA) as human,
    ):
        for start in range(0, num_images, CAPTIONS_AT_A_TIME):
            size = min(CAPTIONS_AT_A_TIME, num_images - start)
            image_ids = pa.array([f"{number:09}.jpg" for number in range(start, start + size)])
            scenes = sentences.draw_words((size, WORDS_OF_A_SCENE))
            for writer in (captions, others):
                confidences = pa.array(sentences.generator.random(size), pa.float32())
                columns = [image_ids, sentences.draw_sentences(scenes), confidences]
                writer.write(pa.record_batch(columns, schema=CAPTIONS_SCHEMA))
            offsets = pa.array(np.arange(size + 1) * references, pa.int32())
            texts = sentences.draw_sentences(np.repeat(scenes, references, axis=0))
            columns = [image_ids, pa.array(["test"] * size), pa.ListArray.from_arrays(offsets, texts)]
            human.write(pa.record_batch(columns, schema=REFERENCES_SCHEMA))


if __name__ == "__main__":
    main()
