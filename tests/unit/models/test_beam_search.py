"""The fast search compared with brute force over a vocabulary of four tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from imcap_ray.config import SearchConfig
from imcap_ray.models.beam_search import Hypothesis, beam_search
from imcap_ray.models.decoders import State, Step, next_tokens
from imcap_ray.models.sampling import sample

VOCABULARY_SIZE, START, END = 4, 0, 1
MAX_LENGTH = 3
EVERY_SEQUENCE = VOCABULARY_SIZE**MAX_LENGTH
NUM_IMAGES = 5


def make_model(seed: int, vocabulary_size: int = VOCABULARY_SIZE) -> Callable[[list[int]], tuple[Step, State]]:
    """Images -> step and start of a model whose every next-token probability depends on the whole prefix."""
    num_prefixes = vocabulary_size ** (MAX_LENGTH + 1)
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(NUM_IMAGES, num_prefixes, vocabulary_size, generator=generator)
    table = logits.log_softmax(dim=-1)

    def start(images: list[int], beam_size: int = 1) -> tuple[Step, State]:
        def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            image, prefix = state
            prefix = (prefix * vocabulary_size + tokens) % num_prefixes
            return table[image, prefix], (image, prefix)

        image = torch.tensor(images).unsqueeze(1).expand(-1, beam_size).contiguous()
        return step, (image, torch.zeros_like(image))

    return start


def settings(**values: Any) -> SearchConfig:
    return SearchConfig(**{"max_length": MAX_LENGTH, "length_penalty": 0.0} | values)


def search(
    model: Any, images: list[int], *, forbidden_ids: tuple[int, ...] = (), **options: Any
) -> list[list[Hypothesis]]:
    config = settings(**options)
    return search_with(*model(images, config.beam_size), config, forbidden_ids)


def search_with(
    step: Step, state: State, config: SearchConfig, forbidden_ids: tuple[int, ...] = ()
) -> list[list[Hypothesis]]:
    candidates = next_tokens(step, state, num_candidates=config.beam_size, end_id=END, forbidden_ids=forbidden_ids)
    return beam_search(candidates, num_images=len(state[0]), search=config, start_id=START, end_id=END)


def brute_force(model: Any, image: int, *, length_penalty: float = 0.0, forbidden: tuple[int, ...] = ()) -> list[Any]:
    """Return all sequences (score, token ids, log-probability), best first."""
    step, start = model([image])
    words = [token for token in range(VOCABULARY_SIZE) if token != END and token not in forbidden]
    sequences = []
    for length in range(MAX_LENGTH + 1):
        for sequence in itertools.product(words, repeat=length):
            logprob, state, previous = 0.0, start, START
            for token in (*sequence, END):
                log_probs, state = step(torch.tensor([[previous]]), state)
                logprob += float(log_probs[0, 0, token])
                previous = token
            sequences.append((logprob / (length + 1) ** length_penalty, sequence, logprob))
    return sorted(sequences, reverse=True)


@pytest.mark.parametrize("forbidden", [(), (START,), (START, 3)])
@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_beam_as_wide_as_the_search_space_finds_every_sequence_in_order(
    seed: int, length_penalty: float, forbidden: tuple[int, ...]
) -> None:
    model = make_model(seed)

    sequences = search(
        model,
        list(range(NUM_IMAGES)),
        beam_size=EVERY_SEQUENCE,
        num_captions=EVERY_SEQUENCE,
        length_penalty=length_penalty,
        forbidden_ids=forbidden,
    )

    for image, hypotheses in enumerate(sequences):
        expected = brute_force(model, image, length_penalty=length_penalty, forbidden=forbidden)
        assert [one.token_ids for one in hypotheses] == [sequence for _, sequence, _ in expected]
        assert [one.logprob for one in hypotheses] == pytest.approx([logprob for _, _, logprob in expected], abs=1e-5)
        assert all(one.num_tokens == len(one.token_ids) + 1 for one in hypotheses)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_early_stopping_does_not_lose_the_best_sequence(length_penalty: float) -> None:
    model = make_model(2)

    for num_captions in (1, 3):
        sequences = search(
            model,
            list(range(NUM_IMAGES)),
            beam_size=EVERY_SEQUENCE,
            num_captions=num_captions,
            length_penalty=length_penalty,
        )
        for image, hypotheses in enumerate(sequences):
            expected = brute_force(model, image, length_penalty=length_penalty)[:num_captions]
            assert [one.token_ids for one in hypotheses] == [sequence for _, sequence, _ in expected]


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    model = make_model(seed)

    sequences = search(model, list(range(NUM_IMAGES)), beam_size=1, length_penalty=0.7)

    for image, (hypothesis,) in enumerate(sequences):
        step, state = model([image])
        tokens: list[int] = []
        logprob, token = 0.0, START
        while token != END:
            log_probs, state = step(torch.tensor([[token]]), state)
            token = END if len(tokens) == MAX_LENGTH else int(log_probs[0, 0].argmax())
            logprob += float(log_probs[0, 0, token])
            tokens.append(token)
        assert hypothesis.token_ids == tuple(tokens[:-1])
        assert hypothesis.logprob == pytest.approx(logprob, abs=1e-5)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_a_batch_equals_its_images_one_at_a_time(beam_size: int) -> None:
    model = make_model(3)

    together = search(model, list(range(NUM_IMAGES)), beam_size=beam_size, num_captions=beam_size)

    assert together == [
        search(model, [image], beam_size=beam_size, num_captions=beam_size)[0] for image in range(NUM_IMAGES)
    ]


def test_a_forbidden_token_never_occurs() -> None:
    for seed in range(10):
        sequences = search(make_model(seed), [0, 1], beam_size=4, num_captions=4, forbidden_ids=(START, 2))

        assert {token for image in sequences for one in image for token in one.token_ids} <= {3}


def test_the_end_is_forced_at_the_length_limit_and_included_in_the_score() -> None:
    log_probs = torch.tensor([0.0, 1e-6, 1.0, 0.0]).log()  # the end is all but impossible

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        return log_probs.expand(*tokens.shape, -1).clone(), state

    ((sequences,),) = search_with(step, (torch.zeros(1, 1),), settings(beam_size=1, max_length=7))

    assert sequences.token_ids == (2,) * 7
    assert sequences.num_tokens == 8
    assert sequences.logprob == pytest.approx(math.log(1e-6))


def test_an_empty_sequence_can_be_the_best() -> None:
    log_probs = torch.tensor([0.02, 0.94, 0.02, 0.02]).log()

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        return log_probs.expand(*tokens.shape, -1).clone(), state

    ((sequences,),) = search_with(step, (torch.zeros(1, 3),), settings(beam_size=3, max_length=5))

    assert (sequences.token_ids, sequences.num_tokens) == ((), 1)


def test_fewer_sequences_are_returned_only_if_no_more_exist() -> None:
    words = VOCABULARY_SIZE - 1
    num_sequences = sum(words**length for length in range(MAX_LENGTH + 1))

    (sequences,) = search(make_model(4), [0], beam_size=EVERY_SEQUENCE, num_captions=EVERY_SEQUENCE)

    assert len(sequences) == len({one.token_ids for one in sequences}) == num_sequences


def test_a_higher_length_penalty_prefers_longer_captions() -> None:
    lengths = []
    for length_penalty in (0.0, 1.0, 3.0):
        sequences = [
            search(make_model(seed), list(range(NUM_IMAGES)), beam_size=EVERY_SEQUENCE, length_penalty=length_penalty)
            for seed in range(3)
        ]
        lengths.append(sum(image[0].num_tokens for images in sequences for image in images))

    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


# ---- sampling


def draw(model: Any, images: list[int], *, num_samples: int, **options: Any) -> list[list[list[int]]]:
    step, state = model(images, num_samples)
    return sample(step, state, start_id=START, end_id=END, max_length=MAX_LENGTH, **options)


def test_sequences_are_sampled_in_proportion_to_their_probability() -> None:
    model = make_model(1)
    torch.manual_seed(0)
    num_samples = 4000

    [sequences] = draw(model, [2], num_samples=num_samples)

    for _, sequence, logprob in brute_force(model, 2)[:6]:
        probability = math.exp(logprob)
        if len(sequence) == MAX_LENGTH:
            continue  # a sample does not force the end: more sequences continue than end here
        error = math.sqrt(probability * (1 - probability) / num_samples)
        assert sequences.count([START, *sequence, END]) / num_samples == pytest.approx(probability, abs=4 * error)


def test_a_low_temperature_samples_probable_sequences_more_often() -> None:
    model = make_model(1)
    torch.manual_seed(0)
    step, state = model([2])
    first = step(torch.tensor([[START]]), state)[0][0, 0]

    [sequences] = draw(model, [2], num_samples=4000, temperature=0.5)

    expected = (first / 0.5).softmax(dim=-1)
    frequencies = torch.bincount(torch.tensor([ids[1] for ids in sequences]), minlength=VOCABULARY_SIZE) / 4000
    errors = (expected * (1 - expected) / 4000).sqrt()
    assert torch.all((frequencies - expected).abs() <= 4 * errors)
    assert float(expected.max()) > float(first.exp().max()) + 0.05


def test_a_sampled_sequence_ends_once_or_is_truncated() -> None:
    torch.manual_seed(1)
    images = list(range(NUM_IMAGES))

    sequences = draw(make_model(2), images, num_samples=50, forbidden_ids=(START, 3))

    assert [len(of_image) for of_image in sequences] == [50] * NUM_IMAGES
    for ids in itertools.chain(*sequences):
        assert ids[0] == START and START not in ids[1:] and 3 not in ids
        assert END not in ids[:-1]
        assert ids[-1] == END or len(ids) == 1 + MAX_LENGTH + 1
    lengths = {len(ids) for ids in itertools.chain(*sequences)}
    assert {2, 3, 4} <= lengths
