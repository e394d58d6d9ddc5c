"""Sampled captions -> rewards and advantages (self-critical training, Rennie et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from imcap_ray.models.decoders import Decoder
from imcap_ray.models.sampling import sample
from imcap_ray.scoring.cider import CiderD
from imcap_ray.text.tokenizers import tokenize_words
from imcap_ray.text.vocabulary import END_ID, START_ID, SUPPRESSED_TOKEN_IDS, Vocabulary


class CaptionReward:
    """CIDEr-D of a caption against those of its image, with document frequencies over all images given.

    `bleu_weight` times the BLEU-4 of the single caption, 0 to 1, is added. Most captions have an n-gram order without a
    match, which would make it 0, so one is added to the matches and the n-grams of every order above the first (Lin and
    Och 2004, ORANGE).

    The end counts as a token; otherwise captions that stop in the middle of a phrase are rewarded (Hu et al. 2023,
    arXiv 2305.12254).
    """

    def __init__(
        self, captions: Mapping[str, Sequence[str]], vocabulary: Vocabulary, *, bleu_weight: float = 0.0
    ) -> None:
        end = vocabulary.tokens[END_ID]
        self._tokens = vocabulary.tokens
        self._indices = {image_id: number for number, image_id in enumerate(captions)}
        self._references = [
            [[*tokenize_words(text, vocabulary.tokenizer), end] for text in texts] for texts in captions.values()
        ]
        self._cider_d = CiderD(self._references)
        self._bleu_weight = bleu_weight

    def __call__(self, image_id: str, token_ids: Sequence[int]) -> float:
        """The reward of token ids from the start token to the end token, if there is one."""
        index, tokens = self._indices[image_id], [self._tokens[token_id] for token_id in token_ids[1:]]
        reward = self._cider_d.score(index, tokens)
        if self._bleu_weight:
            reward += self._bleu_weight * _sentence_bleu()(self._references[index], tokens)
        return reward


@cache
def _sentence_bleu() -> Callable[..., float]:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # takes 1.5 s

    return partial(sentence_bleu, smoothing_function=SmoothingFunction().method2)


@torch.no_grad()
def draw_captions(
    decoder: Decoder,
    features: Tensor,
    *,
    num_samples: int,
    max_length: int,
    temperature: float = 1.0,
    bfloat16: bool = False,
) -> list[list[list[int]]]:
    """Sample captions from the decoder for each image of features (I, R, F), as token ids from start to end."""
    decoder.eval()
    with torch.autocast(features.device.type, torch.bfloat16, enabled=bfloat16):
        step, state = decoder.start(features.float(), num_samples)
        return sample(
            step,
            state,
            start_id=START_ID,
            end_id=END_ID,
            max_length=max_length,
            temperature=temperature,
            forbidden_ids=SUPPRESSED_TOKEN_IDS,
        )


def advantages_of(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each caption's reward minus the mean reward of its image's other captions (Luo 2020, arXiv 2003.09971)."""
    return [
        [(len(image_rewards) * reward - sum(image_rewards)) / (len(image_rewards) - 1) for reward in image_rewards]
        for image_rewards in rewards
    ]
