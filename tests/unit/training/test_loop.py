"""The training loop's steps: trainable layers, views of images, sampled captions, and exchanged values."""

from __future__ import annotations

import copy

import pytest
import torch

from imcap_ray.config import (
    DecoderConfig,
    EncoderConfig,
    PreprocessingConfig,
    Recipe,
    SelfCriticalConfig,
    TrainingConfig,
)
from imcap_ray.errors import ConfigError
from imcap_ray.models.decoders import build_decoder
from imcap_ray.models.encoders import Encoder, build_encoder
from imcap_ray.models.model_weights import select_tensors
from imcap_ray.text.vocabulary import END_ID, START_ID, Vocabulary
from imcap_ray.training.batches import augmentation, make_batch
from imcap_ray.training.loop import Phase, batch_maker, build_learner, unfreeze
from imcap_ray.training.optimization import EndToEnd, Optimization
from imcap_ray.training.phases import SELF_CRITICAL
from imcap_ray.training.team import Team

SIZE = 64


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(
        EncoderConfig(name="efficientnet_lite0"), PreprocessingConfig(image_size=SIZE), load_weights=False
    )


def pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def test_fine_tuning_changes_the_cnn_from_the_first_layer_on_and_no_statistics(encoder: Encoder) -> None:
    unfreeze(encoder, "cnn.blocks.5")
    decoder = build_decoder(
        DecoderConfig(embedding_size=16, hidden_size=16, num_heads=2, dropout=0.0),
        num_channels=encoder.num_channels,
        vocabulary_size=9,
    )
    model = EndToEnd(encoder, decoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TrainingConfig(schedule="constant", learning_rate=1e-2, ema_decay=0.5)
    optimization = Optimization(model, model, config, total_steps=2, encoder_learning_rate=1e-3)

    losses = [
        optimization.step(
            make_batch(pixels(2), [[[START_ID, 5, END_ID]], [[START_ID, 6, 7, END_ID]]], torch.device("cpu"))
        )
        for _ in range(3)
    ]

    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    of_cnn = {name.removeprefix("encoder.") for name in changed if name.startswith("encoder.")}
    expected = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert of_cnn == set(expected)
    assert "cnn.cnn.blocks.5.0.conv_pw.weight" in of_cnn
    assert not any("conv_dw" in name for name in of_cnn), "depthwise filters are unchanged"
    assert not any(name.startswith("cnn.cnn.blocks.4") or "running" in name for name in of_cnn)
    assert not model.encoder.training and model.decoder.training
    assert not equal(optimization.kept.state_dict(), model.state_dict()), "the moving average lags behind"


def test_the_error_for_an_unknown_layer_lists_the_layers_of_the_cnn(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match=r"finetune.first_layer .*'layer9'.*cnn.blocks.0"):
        unfreeze(encoder, "layer9")


def test_without_a_first_layer_the_entire_cnn_is_trained(encoder: Encoder) -> None:
    unfreeze(encoder, "")

    frozen = {name for name, parameter in encoder.cnn.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in encoder.cnn.state_dict() if name.endswith("conv_dw.weight")}


@pytest.mark.parametrize("name", ["timm:convnext_atto", "timm:mobilenetv3_small_050"])
def test_layers_after_the_grid_are_not_trained(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name=name), PreprocessingConfig(image_size=SIZE), load_weights=False)
    unfreeze(encoder, "")

    encoder(pixels(1)).sum().backward()

    learnt = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert learnt == {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert len(learnt) > 20


def test_a_fine_tuning_whose_optimizer_contains_such_layers_resumes() -> None:
    """Single workers of earlier versions saved such states: these layers never had a gradient."""

    def start(*, freezes: bool) -> Optimization:
        torch.manual_seed(0)
        name = "timm:mobilenetv3_small_050"
        encoder = build_encoder(EncoderConfig(name=name), PreprocessingConfig(image_size=SIZE), load_weights=False)
        unfreeze(encoder, "cnn.blocks.4")
        if not freezes:
            encoder.cnn.get_submodule("cnn.conv_head").requires_grad_(True)
        config = DecoderConfig(embedding_size=16, hidden_size=16, num_heads=2, dropout=0.0)
        model = EndToEnd(encoder, build_decoder(config, num_channels=encoder.num_channels, vocabulary_size=9))
        return Optimization(
            model, model, TrainingConfig(schedule="constant"), total_steps=4, encoder_learning_rate=1e-3
        )

    batch = make_batch(pixels(2), [[[START_ID, 5, END_ID]], [[START_ID, 6, 7, END_ID]]], torch.device("cpu"))
    before, resumed = start(freezes=False), start(freezes=True)
    before.step(batch)

    resumed.load_state_dict(copy.deepcopy(before.state_dict()), step=1)

    assert float(resumed.step(batch)[0]) == float(before.step(batch)[0])
    assert equal(resumed.trained.state_dict(), before.trained.state_dict())


def test_an_augmented_image_is_another_view_of_the_same_kind() -> None:
    image = pixels(1)[0]
    torch.manual_seed(3)
    augment = augmentation(SIZE, min_crop_area=0.5)

    views = augment(image.expand(8, -1, -1, -1))

    assert all(view.shape == image.shape and view.dtype == torch.uint8 for view in views)
    assert not any(torch.equal(view, image) for view in views)
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_crops_of_the_full_area_are_the_image_or_its_mirror_image_half_of_the_time() -> None:
    image = pixels(1)[0]
    torch.manual_seed(4)
    augment = augmentation(SIZE, min_crop_area=1.0)

    views = augment(image.expand(200, -1, -1, -1))

    mirrored = sum(torch.equal(view, image.flip(-1)) for view in views)
    same = sum(torch.equal(view, image) for view in views)
    assert mirrored + same == 200
    assert 70 < mirrored < 130


def test_captions_are_drawn_for_other_views_of_the_photographs_at_each_step(encoder: Encoder) -> None:
    recipe = Recipe(
        decoder=DecoderConfig(embedding_size=16, hidden_size=16, num_heads=2),
        self_critical=SelfCriticalConfig(epochs=1, num_samples=3),
    )
    captions = {"1.jpg": ["a dog runs"], "2.jpg": ["a cat sleeps", "a cat lies down"]}
    vocabulary = Vocabulary.build((text for texts in captions.values() for text in texts), tokenizer="ptb", min_count=1)
    learner = build_learner(
        Phase(name=SELF_CRITICAL, recipe=recipe, seed=0),
        vocabulary=vocabulary,
        encoder=encoder,
        start_weights=None,
        num_images=2,
        team=Team(),
    )
    make = batch_maker(learner, captions, torch.device("cpu"))

    batches = [make(pixels(2), list(captions)) for _ in range(2)]

    for batch, numbers in batches:
        assert batch.inputs.shape == (2, encoder.num_regions, encoder.num_channels)
        assert not batch.inputs.requires_grad
        assert len(batch.lengths) == 2 * recipe.self_critical.num_samples
        assert numbers["train_reward"] >= 0
    assert not torch.equal(*(batch.inputs for batch, _ in batches))


def test_a_worker_alone_shares_its_values_with_itself() -> None:
    assert Team().share({"a": 1}) == [{"a": 1}]


def test_tensors_are_selected_by_a_prefix_and_named_without_it() -> None:
    a, b = torch.zeros(1), torch.ones(1)

    assert select_tensors("encoder.", {"encoder.x.y": a, "decoder.x": b}) == {"x.y": a}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())
