"""Tiny models of the transformers library with random weights, saved as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

SIZE: Final = 32
SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS: Final = (*SPECIAL, "a", "the", "dog", "cat", "runs", "sits", "in", "on", "grass", "snow")
LAYERS: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 1.0,
}
VISION: Final[dict[str, Any]] = LAYERS | {"image_size": SIZE, "patch_size": 8}
TOKENS: Final[dict[str, Any]] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
TEXT: Final[dict[str, Any]] = (
    LAYERS | TOKENS | {"vocab_size": len(WORDS), "max_position_embeddings": 64, "sep_token_id": 3}
)


def write_blip(folder: Path) -> Path:
    """BLIP: an image encoder, and a text decoder with cross-attention."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    text = TEXT | {"encoder_hidden_size": 32, "projection_dim": 16}
    config = BlipConfig(text_config=text, vision_config=VISION | {"projection_dim": 16}, projection_dim=16)
    _save(folder, lambda: BlipForConditionalGeneration(config))
    BlipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def write_git(folder: Path) -> Path:
    """GIT: a decoder whose first tokens are the image; its processor crops."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM

    _save(folder, lambda: GitForCausalLM(GitConfig(vision_config=VISION, **TEXT)))
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def write_vit_gpt2(folder: Path) -> Path:
    """ViT and GPT-2 as a VisionEncoderDecoderModel."""
    from transformers import (
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": len(WORDS)}
    decoder = GPT2Config(**sizes, **TOKENS, is_decoder=True, add_cross_attention=True, initializer_range=1.0)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)

    def build() -> Any:
        model = VisionEncoderDecoderModel(config)
        model.generation_config.update(decoder_start_token_id=2, **TOKENS)
        return model

    _save(folder, build)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def _save(folder: Path, build: Callable[[], Any]) -> None:
    """Save a model with weights from a seed, and a tokenizer that knows WORDS."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        build().eval().save_pretrained(folder)
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


WRITERS: Final = {"blip": write_blip, "git": write_git, "vit-gpt2": write_vit_gpt2}
