"""Batches, phases, interruptions and rewards; and a tiny model memorises eight images."""

from __future__ import annotations

import copy
import io
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imcap_ray.config import DecoderConfig, FinetuneConfig, Recipe, SelfCriticalConfig, TrainingConfig
from imcap_ray.models.decoders import AttentionDecoder, Decoder, build_decoder
from imcap_ray.scoring.cider import CiderD
from imcap_ray.text.vocabulary import END_ID, PADDING_ID, START_ID, SUPPRESSED_TOKEN_IDS, Vocabulary
from imcap_ray.training import optimization
from imcap_ray.training.batches import make_batch
from imcap_ray.training.optimization import Optimization, learning_rate_factor
from imcap_ray.training.phases import kind_of, next_phase, num_epochs, phases
from imcap_ray.training.rewards import CaptionReward, advantages_of, draw_captions

CPU = torch.device("cpu")
NUM_IMAGES, NUM_REGIONS, NUM_CHANNELS, VOCABULARY_SIZE = 8, 4, 12, 30
PLAIN = TrainingConfig(schedule="constant", learning_rate=1e-2, label_smoothing=0.0, weight_decay=0.0)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable bfloat16, which some CPUs would use, because it has three digits."""
    monkeypatch.setattr(optimization, "prefers_bfloat16", lambda device: False)


@pytest.fixture(params=["attention", "lstm"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(request.param)


def make_decoder(name: str = "attention", *, dropout: float = 0.0) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(name=name, embedding_size=16, hidden_size=32, num_heads=2, dropout=dropout)
    return build_decoder(config, num_channels=NUM_CHANNELS, vocabulary_size=VOCABULARY_SIZE)


def make_features() -> Tensor:
    return torch.randn(NUM_IMAGES, NUM_REGIONS, NUM_CHANNELS, generator=torch.Generator().manual_seed(1))


def make_captions() -> list[list[list[int]]]:
    """Return two captions of each image, of three to nine words."""
    generator = torch.Generator().manual_seed(2)

    def words(count: int) -> list[int]:
        return list(torch.randint(4, VOCABULARY_SIZE, (count,), generator=generator).tolist())

    return [[[START_ID, *words(3 + (image + 3 * k) % 7), END_ID] for k in range(2)] for image in range(NUM_IMAGES)]


def optimize(decoder: Decoder, config: TrainingConfig = PLAIN, *, total_steps: int = 20) -> Optimization:
    return Optimization(decoder, decoder, config, total_steps=total_steps)


def whole_batch() -> Any:
    return make_batch(make_features(), make_captions(), CPU)


def test_every_token_except_the_start_is_a_target_exactly_once() -> None:
    captions = make_captions()

    batch = whole_batch()

    words = sorted(token for of_image in captions for ids in of_image for token in ids[1:])
    assert sorted(batch.targets[batch.targets != PADDING_ID].tolist()) == words
    assert batch.num_tokens == len(words)
    assert len(batch.targets) == int(batch.lengths.sum())
    assert batch.lengths.tolist() == sorted(batch.lengths.tolist(), reverse=True)
    for row, image in enumerate(batch.image_of_caption.tolist()):
        ids = batch.token_ids[row][batch.token_ids[row] != PADDING_ID].tolist()
        assert [token for token in ids if token != END_ID] in [one[:-1] for one in captions[image]]


def test_a_step_uses_few_distinct_batch_sizes() -> None:
    features, captions = make_features().repeat(5, 1, 1), 5 * make_captions()

    batch = make_batch(features, captions, CPU)

    packed = torch.nn.utils.rnn.pack_padded_sequence(batch.token_ids, batch.lengths, batch_first=True)
    assert len(batch.lengths) == 80
    assert set(packed.batch_sizes.tolist()) <= {16, 32, 48, 64, 80}


def test_padding_changes_neither_loss_nor_step(decoder: Decoder) -> None:
    config, results = replace(PLAIN, label_smoothing=0.1), []
    for bucket_size in (1, 4, 16):
        optimization = optimize(copy.deepcopy(decoder), config)
        advantages = [[0.5, -1.0]] * NUM_IMAGES
        batch = make_batch(make_features(), make_captions(), CPU, advantages=advantages, bucket_size=bucket_size)
        loss, num_tokens = optimization.step(batch)
        weights = torch.cat([parameter.detach().flatten() for parameter in optimization.trained.parameters()])
        results.append((float(loss), num_tokens, weights))

    for loss, num_tokens, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert num_tokens == results[0][1]
        assert torch.allclose(weights, results[0][2], rtol=1e-3, atol=2e-3)


def test_the_loss_of_a_batch_is_the_sum_over_its_captions(decoder: Decoder) -> None:
    features, captions = make_features(), make_captions()

    loss, num_tokens = optimize(copy.deepcopy(decoder)).step(whole_batch())

    alone = [
        optimize(copy.deepcopy(decoder)).step(make_batch(features[image : image + 1], [[ids]], CPU))
        for image, of_image in enumerate(captions)
        for ids in of_image
    ]
    assert num_tokens == sum(number for _, number in alone)
    assert float(loss) == pytest.approx(sum(float(value) for value, _ in alone), rel=1e-5)


def test_an_image_without_captions_changes_nothing(decoder: Decoder) -> None:
    features, captions = make_features(), make_captions()
    expected = optimize(copy.deepcopy(decoder)).step(make_batch(features[1:], captions[1:], CPU))

    actual = optimize(copy.deepcopy(decoder)).step(make_batch(features, [[], *captions[1:]], CPU))

    assert list(map(float, actual)) == pytest.approx(list(map(float, expected)), rel=1e-5)


def test_label_smoothing_changes_the_step_and_not_the_reported_loss() -> None:
    plain, smooth = make_decoder(), make_decoder()

    losses = [
        optimize(decoder, replace(PLAIN, label_smoothing=smoothing)).step(whole_batch())
        for decoder, smoothing in ((plain, 0.0), (smooth, 0.2))
    ]

    assert losses[0] == losses[1]
    assert not equal(plain.state_dict(), smooth.state_dict())


def test_a_tiny_model_memorises_eight_images(decoder: Decoder) -> None:
    optimization, batch = optimize(decoder, replace(PLAIN, learning_rate=2e-2)), whole_batch()

    losses = [float(loss) / num_tokens for loss, num_tokens in (optimization.step(batch) for _ in range(150))]

    assert losses[0] == pytest.approx(math.log(VOCABULARY_SIZE), rel=0.2), (
        "an untrained model predicts all words equally"
    )
    assert losses[-1] < 0.1 * losses[0]


def test_advantages_weight_the_tokens_of_their_own_caption() -> None:
    captions = make_captions()
    advantages = [[10.0 * image + k for k in range(2)] for image in range(NUM_IMAGES)]

    batch = make_batch(make_features(), captions, CPU, advantages=advantages)

    padded = torch.nn.utils.rnn.PackedSequence
    sizes = torch.nn.utils.rnn.pack_padded_sequence(batch.token_ids, batch.lengths, batch_first=True).batch_sizes
    weights, lengths = torch.nn.utils.rnn.pad_packed_sequence(padded(batch.weights, sizes), batch_first=True)
    for row, image in enumerate(batch.image_of_caption.tolist()):
        length = int(lengths[row])
        ids = batch.token_ids[row].tolist()
        place = next(k for k, one in enumerate(captions[image]) if one[:-1] == ids[: len(one) - 1])
        assert weights[row, :length].tolist() == [advantages[image][place]] * length
    assert make_batch(make_features(), captions, CPU).weights.tolist() == [1.0] * len(batch.targets)


def test_the_gradient_is_clipped() -> None:
    decoder = make_decoder()

    optimize(decoder, replace(PLAIN, gradient_clip=1e-3)).step(whole_batch())

    norms = [parameter.grad.norm() for parameter in decoder.parameters() if parameter.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_dropout_is_active_in_a_step_even_if_the_module_was_in_eval_mode() -> None:
    decoder = make_decoder(dropout=0.5).eval()
    optimization = optimize(decoder)

    optimization.step(whole_batch())

    assert decoder.training


# ---- the reward


def test_an_advantage_is_the_reward_minus_the_mean_of_the_other_samples() -> None:
    assert advantages_of([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]]) == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_the_reward_is_cider_d_with_the_end_as_a_token() -> None:
    captions = {"a": ["a dog runs", "a dog plays on grass"], "b": ["two men sit", "men on a bench"]}
    vocabulary = Vocabulary.build(text for texts in captions.values() for text in texts)
    reward = CaptionReward(captions, vocabulary)
    ids = vocabulary.to_ids("a dog runs", max_length=9)

    end = vocabulary.tokens[END_ID]
    cider_d = CiderD([[[*text.split(), end] for text in texts] for texts in captions.values()])
    assert reward("a", ids) == pytest.approx(cider_d.score(0, ["a", "dog", "runs", end]))
    assert reward("a", ids) > reward("a", ids[:-1]), "a caption without an end scores less"
    assert reward("a", ids) > reward("b", ids)


def test_bleu_contributes_to_the_reward_by_its_weight() -> None:
    captions = {"a": ["a dog runs", "a dog plays on grass"], "b": ["two men sit", "men on a bench"]}
    vocabulary = Vocabulary.build(text for texts in captions.values() for text in texts)
    plain, mixed = (CaptionReward(captions, vocabulary, bleu_weight=weight) for weight in (0.0, 2.0))

    for text, matches in {
        # With the end: of each order, one more than match and one more than there are, but for single tokens.
        "a dog runs": (4 / 4, 4 / 4, 3 / 3, 2 / 2),
        "a dog sits": (3 / 4, 2 / 4, 1 / 3, 1 / 2),
    }.items():
        ids = vocabulary.to_ids(text, max_length=9)
        bleu = math.prod(matches) ** (1 / 4)
        assert mixed("a", ids) - plain("a", ids) == pytest.approx(2 * bleu), text
    assert mixed("a", [START_ID, END_ID]) >= 0, "an empty caption"


def test_captions_are_sampled_in_proportion_to_their_probability() -> None:
    decoder, features = make_decoder().eval(), make_features()[:1]
    torch.manual_seed(5)

    drawn = [ids[1] for _ in range(20) for ids in draw_captions(decoder, features, num_samples=200, max_length=1)[0]]

    step, state = decoder.start(features, 1)
    probabilities = step(torch.tensor([[START_ID]]), state)[0][0, 0].exp().detach()
    probabilities[list(SUPPRESSED_TOKEN_IDS)] = 0.0
    probabilities = probabilities / probabilities.sum()
    frequencies = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY_SIZE) / len(drawn)
    errors = (probabilities * (1 - probabilities) / len(drawn)).sqrt()
    assert torch.all((frequencies - probabilities).abs() <= 4 * errors)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_step_uses_the_probabilities_with_which_captions_were_sampled(decoder: Decoder, temperature: float) -> None:
    torch.manual_seed(6)
    features = make_features()
    drawn = draw_captions(decoder, features, num_samples=3, max_length=5, temperature=temperature)
    expected = 0.0
    for image, of_image in enumerate(drawn):
        for ids in of_image:
            step, state = decoder.start(features[image : image + 1], 1)
            for token, following in itertools.pairwise(ids):
                log_probs, state = step(torch.tensor([[token]]), state)
                log_probs[..., list(SUPPRESSED_TOKEN_IDS)] = float("-inf")
                expected -= float((log_probs.detach() / temperature).log_softmax(dim=-1)[0, 0, following])
    optimization = Optimization(
        decoder, decoder, PLAIN, total_steps=9, temperature=temperature, forbidden_ids=SUPPRESSED_TOKEN_IDS
    )

    actual, num_tokens = optimization.step(
        make_batch(features, drawn, CPU, advantages=[[0.3, -0.1, -0.2]] * NUM_IMAGES)
    )

    assert actual == pytest.approx(expected, rel=1e-4)
    assert num_tokens == sum(len(ids) - 1 for of_image in drawn for ids in of_image)
    bias = decoder.output_bias if isinstance(decoder, AttentionDecoder) else decoder.output.bias
    assert bias.grad is not None
    assert bias.grad[list(SUPPRESSED_TOKEN_IDS)].tolist() == [0.0, 0.0, 0.0]


def test_a_step_computes_in_bfloat16_only_if_the_optimization_uses_it() -> None:
    def nats(uses_bfloat16: bool) -> float:
        decoder = make_decoder()
        optimization = Optimization(decoder, decoder, PLAIN, total_steps=9)
        optimization.uses_bfloat16 = uses_bfloat16
        captions = [[[START_ID, 7, 9, END_ID]]] * NUM_IMAGES
        return float(optimization.step(make_batch(make_features(), captions, CPU))[0])

    assert nats(True) != nats(False)
    assert nats(True) == pytest.approx(nats(False), rel=0.02)


def test_rewarded_captions_become_more_probable() -> None:
    decoder, features = make_decoder(), make_features()
    optimization = optimize(decoder)
    wanted = [START_ID, 7, 9, END_ID]

    def mean_reward() -> float:
        drawn = draw_captions(decoder, features, num_samples=8, max_length=6)
        rewards = [[sum(token in wanted for token in ids[1:]) / len(ids) for ids in of_image] for of_image in drawn]
        optimization.step(make_batch(features, drawn, CPU, advantages=advantages_of(rewards)))
        return sum(map(sum, rewards)) / sum(map(len, rewards))

    torch.manual_seed(3)
    before = mean_reward()
    after = [mean_reward() for _ in range(60)][-1]

    assert before < 0.3 < 0.6 < after


# ---- the phases


def recipe_of(*, finetune: int = 0, self_critical: int = 0, patience: int = 2) -> Recipe:
    return Recipe(
        training=TrainingConfig(epochs=4, patience=patience, label_smoothing=0.1),
        finetune=FinetuneConfig(epochs=finetune, learning_rate=1e-4, patience=0),
        self_critical=SelfCriticalConfig(epochs=self_critical, learning_rate=2e-5, patience=1),
    )


def rows(phase: str, *scores: float) -> list[dict[str, Any]]:
    return [{"phase": phase, "cider_d": score} for score in scores]


def test_phases_follow_each_other_with_their_own_settings() -> None:
    recipe = recipe_of(finetune=3, self_critical=5)

    by_phase = phases(recipe)

    assert list(by_phase) == ["cross_entropy", "finetune", "self_critical"]
    assert by_phase["cross_entropy"] == recipe.training
    assert [settings.epochs for settings in by_phase.values()] == [4, 3, 5]
    assert [settings.learning_rate for settings in by_phase.values()] == [recipe.training.learning_rate, 1e-4, 2e-5]
    assert [settings.label_smoothing for settings in by_phase.values()] == [0.1, 0.1, 0.0]
    assert num_epochs(recipe) == 12
    assert list(phases(recipe_of(self_critical=1))) == ["cross_entropy", "self_critical"]


def test_phases_that_are_repeated_follow_each_other_with_the_same_settings() -> None:
    once = recipe_of(finetune=3, self_critical=2)
    recipe = replace(
        once,
        finetune=replace(once.finetune, repetitions=2),
        self_critical=replace(once.self_critical, repetitions=3, patience=0),
    )

    by_phase = phases(recipe)

    kinds = {"finetune": 2, "self_critical": 3}
    assert list(by_phase) == [
        "cross_entropy", "finetune", "finetune_2", "self_critical", "self_critical_2", "self_critical_3"
    ]  # fmt: skip
    assert [kind_of(phase) for phase in by_phase] == ["cross_entropy", *2 * ["finetune"], *3 * ["self_critical"]]
    for kind, times in kinds.items():
        assert all(by_phase[f"{kind}_{number}"] == by_phase[kind] for number in range(2, times + 1))
    assert num_epochs(recipe) == 4 + 2 * 3 + 3 * 2
    history: list[dict[str, Any]] = []
    while (phase := next_phase(history, recipe)) is not None:
        history += rows(phase, 0.1 * len(history))
    assert [row["phase"] for row in history] == [phase for phase, of in by_phase.items() for _ in range(of.epochs)]


def test_a_phase_ends_after_its_epochs_or_when_it_stops_improving() -> None:
    recipe = recipe_of(finetune=2, self_critical=9)
    first, second = rows("cross_entropy", 0.1, 0.2, 0.3, 0.4), rows("finetune", 0.3, 0.2)

    assert next_phase([], recipe) == "cross_entropy"
    assert next_phase(first[:3], recipe) == "cross_entropy"
    assert next_phase(rows("cross_entropy", 0.3, 0.2), recipe) == "cross_entropy", (
        "only one epoch without a better score"
    )
    assert next_phase(rows("cross_entropy", 0.3, 0.2, 0.3), recipe) == "finetune", "two without a better score"
    assert next_phase(first, recipe) == "finetune"
    assert next_phase(first + second[:1], recipe) == "finetune"
    assert next_phase(first + second, recipe) == "self_critical"
    assert next_phase(first + second + rows("self_critical", 0.5), recipe) == "self_critical"
    assert next_phase(first + second + rows("self_critical", 0.5, 0.4), recipe) is None
    assert next_phase(rows("cross_entropy", 0.4, 0.3, 0.2, 0.1), recipe_of(patience=0)) is None
    assert next_phase(rows("cross_entropy", 0.4, 0.3, 0.2), recipe_of(patience=0)) == "cross_entropy"


# ---- the schedule


def test_the_learning_rate_warms_up_linearly_and_decays_by_a_cosine() -> None:
    config = TrainingConfig(warmup_steps=10)
    factors = [learning_rate_factor(step, 100, config) for step in range(101)]

    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.505)  # half way between the peak and 1 %
    assert factors[100] == pytest.approx(0.01)
    assert learning_rate_factor(500, 100, config) == pytest.approx(0.01)


def test_a_constant_learning_rate_is_constant() -> None:
    assert {learning_rate_factor(step, 100, PLAIN) for step in range(101)} == {1.0}


def test_a_training_can_be_shorter_than_its_warm_up() -> None:
    factors = [learning_rate_factor(step, 3, TrainingConfig(warmup_steps=10)) for step in range(4)]

    assert factors == sorted(factors)
    assert learning_rate_factor(0, 0, TrainingConfig(warmup_steps=0)) == 1.0


def test_each_step_uses_the_learning_rate_of_the_schedule() -> None:
    config = replace(PLAIN, schedule="cosine", warmup_steps=2)
    optimization = optimize(make_decoder(), config, total_steps=5)

    learning_rates = []
    for _ in range(5):
        learning_rates.append(optimization.optimizer.param_groups[0]["lr"])
        optimization.step(whole_batch())

    assert learning_rates == pytest.approx(
        [config.learning_rate * learning_rate_factor(step, 5, config) for step in range(5)]
    )


# ---- the moving average


def test_without_a_moving_average_the_decoder_itself_is_kept() -> None:
    decoder = make_decoder()

    assert optimize(decoder).kept is decoder


def test_the_moving_average_follows_the_weights() -> None:
    decay, decoder = 0.8, make_decoder()
    optimization = optimize(decoder, replace(PLAIN, ema_decay=decay))

    optimization.step(whole_batch())
    assert equal(optimization.kept.state_dict(), decoder.state_dict()), (
        "the average starts at the weights of the first step"
    )
    expected = clone(decoder.state_dict())
    for _ in range(3):
        optimization.step(whole_batch())
        expected = {
            name: decay * expected[name] + (1 - decay) * tensor for name, tensor in decoder.state_dict().items()
        }

    for name, tensor in optimization.kept.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_training_resumes_from_its_state_as_if_never_interrupted(optimizer: str, ema_decay: float) -> None:
    config = replace(PLAIN, optimizer=optimizer, ema_decay=ema_decay, schedule="cosine", warmup_steps=3)
    batch = whole_batch()
    uninterrupted = optimize(make_decoder(), config)
    for _ in range(4):
        uninterrupted.step(batch)
    file = io.BytesIO()
    torch.save(uninterrupted.state_dict(), file)
    torch.manual_seed(99)
    resumed = optimize(
        build_decoder(  # other weights than those of the state
            DecoderConfig(embedding_size=16, hidden_size=32, num_heads=2, dropout=0.0),
            num_channels=NUM_CHANNELS,
            vocabulary_size=VOCABULARY_SIZE,
        ),
        config,
    )

    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True), step=4)

    for _ in range(3):
        assert resumed.step(batch) == uninterrupted.step(batch)
    assert equal(resumed.trained.state_dict(), uninterrupted.trained.state_dict())
    assert equal(resumed.kept.state_dict(), uninterrupted.kept.state_dict())


def test_a_schedule_resumes_at_the_same_fraction_if_the_steps_per_epoch_change() -> None:
    config = replace(PLAIN, schedule="cosine", warmup_steps=0)
    of_two_workers = optimize(make_decoder(), config, total_steps=20)
    for _ in range(10):
        of_two_workers.step(whole_batch())
    of_one_worker = optimize(make_decoder(), config, total_steps=40)

    of_one_worker.load_state_dict(of_two_workers.state_dict(), step=20)

    rates = [one.optimizer.param_groups[0]["lr"] for one in (of_two_workers, of_one_worker)]
    assert rates[0] == rates[1] < config.learning_rate
    of_one_worker.step(whole_batch())
    assert of_one_worker.optimizer.param_groups[0]["lr"] == pytest.approx(
        config.learning_rate * learning_rate_factor(21, 40, config)
    )


def clone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
