"""Names and largest sizes of the files in a model folder."""

from __future__ import annotations

from typing import Final

CONFIG_FILE: Final = "config.json"

WEIGHTS_FILE: Final = "model.safetensors"

VOCABULARY_FILE: Final = "vocabulary.json"

METRICS_FILE: Final = "metrics.json"

CARD_FILE: Final = "README.md"

IMAGE_NETWORK: Final = "encoder_int8"
"""Stem of the two files of a network in int8, see `QuantizedModel`."""

STEP_NETWORK: Final = "decoder_int8"
"""Stem of the two files of the other one."""

GRAPH_SUFFIX: Final = ".xml"

NETWORK_WEIGHTS_SUFFIX: Final = ".bin"

FAMILIARITY_FILE: Final = "familiarity.safetensors"

INT8_FAMILIARITY_FILE: Final = "familiarity_int8.safetensors"

MAX_BYTES: Final = {
    CONFIG_FILE: 2**20,
    VOCABULARY_FILE: 2**26,
    METRICS_FILE: 2**26,
    WEIGHTS_FILE: 2**34,
    FAMILIARITY_FILE: 2**24,
    IMAGE_NETWORK + GRAPH_SUFFIX: 2**26,
    IMAGE_NETWORK + NETWORK_WEIGHTS_SUFFIX: 2**32,
    STEP_NETWORK + GRAPH_SUFFIX: 2**26,
    STEP_NETWORK + NETWORK_WEIGHTS_SUFFIX: 2**32,
    INT8_FAMILIARITY_FILE: 2**24,
}
"""Sizes of the largest files that are read, because each is read into memory."""
