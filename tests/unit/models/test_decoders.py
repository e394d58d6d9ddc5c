"""A decoder computes the same function in training and in search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from imcap_ray.config import DecoderConfig, SearchConfig
from imcap_ray.errors import ConfigError
from imcap_ray.models.decoders import DECODERS, AttentionDecoder, Decoder, build_decoder, run_lstm
from imcap_ray.models.torch_captioner import search_captions
from imcap_ray.text.vocabulary import PADDING_ID, START_ID, Vocabulary

NUM_IMAGES, NUM_REGIONS, NUM_CHANNELS = 3, 5, 12
VOCABULARY = Vocabulary([f"word{number}" for number in range(26)])
# Captions as ids from start on, the longest first, and the image of each: of one image none, one and several.
LENGTHS = [7, 5, 5, 2, 1]
IMAGE_OF_CAPTION = [2, 0, 2, 0, 0]


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(request.param)


def make_decoder(name: str, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    config = DecoderConfig(name=name, embedding_size=8, hidden_size=16, num_heads=4)
    decoder = build_decoder(config, num_channels=NUM_CHANNELS, vocabulary_size=len(VOCABULARY)).eval()
    for parameter in decoder.parameters():
        parameter.data *= 3  # the more decided, the less a mistake can hide
    return decoder


def make_features(num_images: int = NUM_IMAGES) -> Tensor:
    return torch.randn(num_images, NUM_REGIONS, NUM_CHANNELS, generator=torch.Generator().manual_seed(1))


def make_captions() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(4, len(VOCABULARY), (len(LENGTHS), max(LENGTHS)), generator=generator)
    token_ids[:, 0] = START_ID
    for caption, length in enumerate(LENGTHS):
        token_ids[caption, length:] = PADDING_ID
    return token_ids


def teacher_forced(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """Log-probabilities (N, T, V) by the forward pass; zeros after the end of a caption."""
    lengths = torch.tensor(LENGTHS)
    logits = decoder(make_features(), token_ids, lengths, torch.tensor(IMAGE_OF_CAPTION))
    batch_sizes = pack_padded_sequence(token_ids, lengths, batch_first=True).batch_sizes
    return pad_packed_sequence(PackedSequence(logits.log_softmax(dim=-1), batch_sizes), batch_first=True)[0]


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("has_operators", [True, False])
@torch.inference_mode()
def test_step_by_step_log_probabilities_are_those_of_the_forward_pass(
    decoder: Decoder, is_frozen: bool, has_operators: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids = make_captions()
    expected = teacher_forced(decoder, token_ids)
    if not has_operators:  # as on a torch without oneDNN
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    if is_frozen:
        decoder.freeze()

    for caption, (image, length) in enumerate(zip(IMAGE_OF_CAPTION, LENGTHS, strict=True)):
        step, state = decoder.start(make_features()[image : image + 1], 1)
        for position in range(length):
            log_probs, state = step(token_ids[caption, position].view(1, 1), state)

            torch.testing.assert_close(log_probs[0, 0], expected[caption, position], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_beams_of_one_image_are_independent(decoder: Decoder) -> None:
    token_ids = make_captions()[:3, :5]  # three captions of five tokens on three beams of every image
    together, state = decoder.start(make_features(), 3)
    outputs = []
    for position in range(5):
        log_probs, state = together(token_ids[:, position].expand(NUM_IMAGES, -1), state)
        outputs.append(log_probs)

    for image in range(NUM_IMAGES):
        for beam in range(3):
            step, state = decoder.start(make_features()[image : image + 1], 1)
            for position in range(5):
                log_probs, state = step(token_ids[beam, position].view(1, 1), state)
                torch.testing.assert_close(log_probs[0, 0], outputs[position][image, beam], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_padding_changes_nothing(decoder: Decoder) -> None:
    token_ids = make_captions()
    expected = teacher_forced(decoder, token_ids)
    padded = token_ids.clone()
    for caption, length in enumerate(LENGTHS):
        padded[caption, length:] = 9

    assert torch.equal(teacher_forced(decoder, padded), expected)


@torch.inference_mode()
def test_predictions_depend_on_the_image_and_every_earlier_word(decoder: Decoder) -> None:
    token_ids = make_captions()
    expected = teacher_forced(decoder, token_ids)
    changed = token_ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % len(VOCABULARY)

    actual = teacher_forced(decoder, changed)

    assert torch.equal(actual[0, :2], expected[0, :2])
    for position in range(2, LENGTHS[0]):
        assert not torch.allclose(actual[0, position], expected[0, position])
    assert torch.equal(actual[1:], expected[1:])
    assert not torch.allclose(expected[1, 0], expected[2, 0]), "the first word after start, of two images"


@pytest.mark.parametrize("search", [SearchConfig(beam_size=1, max_length=6), SearchConfig(beam_size=4, num_captions=4)])
def test_a_batch_of_images_gets_the_captions_of_its_images_one_at_a_time(
    decoder: Decoder, search: SearchConfig
) -> None:
    features = make_features(6)

    together = search_captions(decoder, VOCABULARY, features, search)

    assert len({actual[0].text for actual in together}) > 1
    for image, actual in enumerate(together):
        (alone,) = search_captions(decoder, VOCABULARY, features[image : image + 1], search)
        assert [one.text for one in actual] == [one.text for one in alone]
        assert [one.logprob for one in actual] == pytest.approx([one.logprob for one in alone], abs=1e-4)


@torch.inference_mode()
def test_a_captions_logprob_is_that_of_the_forward_pass(decoder: Decoder) -> None:
    """Through all the layers: decoder, search, words and back."""
    features = make_features()
    for image, (caption, *_) in enumerate(search_captions(decoder, VOCABULARY, features, SearchConfig(max_length=8))):
        ids = torch.tensor([VOCABULARY.to_ids(caption.text, max_length=8)])
        lengths = torch.tensor([ids.shape[1] - 1])
        logits = decoder(features, ids[:, :-1], lengths, torch.tensor([image]))
        expected = logits.log_softmax(dim=-1).gather(1, ids[0, 1:].unsqueeze(1)).sum()

        assert caption.num_tokens == int(lengths)
        assert caption.logprob == pytest.approx(float(expected), abs=1e-4)


def test_no_caption_contains_a_special_token() -> None:
    for name in DECODERS:
        for seed in range(4):
            actual = search_captions(
                make_decoder(name, seed), VOCABULARY, make_features(), SearchConfig(beam_size=4, num_captions=4)
            )
            for caption in (one for image in actual for one in image):
                words = caption.text.split()
                assert len(words) == caption.num_tokens - 1  # a special token is not written
                assert all(word.startswith("word") for word in words)


def test_dropout_is_active_only_in_training(decoder: Decoder) -> None:
    with torch.no_grad():
        token_ids = make_captions()
        assert torch.equal(teacher_forced(decoder, token_ids), teacher_forced(decoder, token_ids))
        decoder.train()
        assert not torch.equal(teacher_forced(decoder, token_ids), teacher_forced(decoder, token_ids))


def test_the_seed_decides_the_weights(decoder: Decoder) -> None:
    name = "attention" if hasattr(decoder, "query") else "lstm"

    again, other = make_decoder(name).state_dict(), make_decoder(name, seed=1).state_dict()

    assert all(torch.equal(tensor, again[key]) for key, tensor in decoder.state_dict().items())
    assert not all(torch.equal(tensor, other[key]) for key, tensor in decoder.state_dict().items())


def test_every_parameter_receives_a_gradient(decoder: Decoder) -> None:
    logits = decoder(make_features(), make_captions(), torch.tensor(LENGTHS), torch.tensor(IMAGE_OF_CAPTION))

    logits.square().sum().backward()

    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        # The softmax over the regions takes no notice of a constant added to all keys.
        assert name == "key.bias" or bool(parameter.grad.any()), name


def test_states_and_gradients_are_those_of_torchs_own_lstm() -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(6, 8).double()
    inputs = torch.randn(sum(LENGTHS), 6).double().requires_grad_()
    packed = PackedSequence(inputs, torch.tensor([sum(length > step for length in LENGTHS) for step in range(7)]))

    def compute(states: PackedSequence) -> list[Tensor]:
        loss = (states.data * torch.linspace(-1, 1, 8)).square().sum()
        return [states.data, *torch.autograd.grad(loss, [inputs, *lstm.parameters()])]

    for ours, torchs in zip(compute(run_lstm(lstm, packed)), compute(lstm(packed)[0]), strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_small_gradients_do_not_underflow_under_autocast(decoder: Decoder) -> None:
    decoder.cuda()
    features, token_ids, image_of_caption = make_features(), make_captions(), torch.tensor(IMAGE_OF_CAPTION)
    with torch.autocast("cuda", torch.bfloat16):
        logits = decoder(features.cuda(), token_ids.cuda(), torch.tensor(LENGTHS), image_of_caption.cuda())

    (1e-9 * logits.float()).square().sum().backward()  # float16 ends at 6e-8

    for name, parameter in decoder.named_parameters():
        if "lstm" in name:
            assert parameter.grad is not None and bool(parameter.grad.any()), name


class _ReadableAttention(AttentionDecoder):
    """Records the attention weights of every step."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.weights: list[Tensor] = []

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Instead of its value each region has its own unit vector, so that the attended vectors are the weights.
        units = torch.eye(NUM_REGIONS).expand(1, self.num_heads, -1, -1)
        attended = super().attend(queries, keys, units)
        self.weights.append(attended.unflatten(2, (self.num_heads, -1)).mean(dim=2)[0, 0])
        return super().attend(queries, keys, values)


@torch.inference_mode()
def test_attention_weights_are_those_used_by_the_search() -> None:
    sizes = {"embedding_size": 8, "hidden_size": 16, "num_heads": 4}
    decoder = _ReadableAttention(num_channels=NUM_CHANNELS, vocabulary_size=len(VOCABULARY), **sizes).eval()
    decoder.load_state_dict(make_decoder("attention").state_dict())
    features, token_ids = make_features(1), make_captions()[:1]
    step, state = decoder.start(features, 1)
    for position in range(token_ids.shape[1]):
        _, state = step(token_ids[:, position : position + 1], state)

    weights = decoder.attention(features[0], token_ids[0])

    assert torch.allclose(weights, torch.stack(decoder.weights), atol=1e-6)
    assert torch.allclose(weights.sum(dim=1), torch.ones(len(weights)))


def test_the_error_for_an_impossible_decoder_names_the_reason() -> None:
    with pytest.raises(ConfigError, match="no decoder 'gru': expected one of attention, lstm"):
        build_decoder(DecoderConfig(name="gru"), num_channels=1, vocabulary_size=5)
    with pytest.raises(ConfigError, match=r"num_heads must be a divisor of decoder.hidden_size \(10\), got 4"):
        build_decoder(DecoderConfig(hidden_size=10, num_heads=4), num_channels=1, vocabulary_size=5)


@pytest.mark.parametrize("name", DECODERS)
def test_the_feature_weight_is_as_wide_as_the_features(name: str) -> None:
    weight = make_decoder(name).state_dict()[DECODERS[name].feature_weight]

    assert weight.shape[1] == NUM_CHANNELS
