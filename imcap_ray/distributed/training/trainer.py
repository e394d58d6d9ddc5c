"""Captioned images -> a model folder, by Ray Train."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pyarrow as pa
import ray
import safetensors.torch
import torch
from torch import Tensor

from imcap_ray import storage
from imcap_ray.config import Recipe, ResourcesConfig, TrainingRunConfig, to_mapping
from imcap_ray.data.dataset_check import require_readable
from imcap_ray.data.datasets import DATASET_SCHEMA, TRAIN, VALIDATION, CaptionedImages
from imcap_ray.data.parquet_files import write_table
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.cluster.gpus import require_gpus
from imcap_ray.distributed.features import FeatureCache
from imcap_ray.distributed.training.checkpoints import EpochCheckpoint, choose_best, recover
from imcap_ray.distributed.training.learn_familiarity import describe_images, learn_familiarity
from imcap_ray.distributed.training.phase_start import (
    read_weights,
    start_of_phase,
    start_weights_file,
    with_cnn_weights,
    with_new_words,
)
from imcap_ray.distributed.training.train_worker import WorkerJob
from imcap_ray.distributed.training.training_inputs import (
    Inputs,
    cache_split,
    count_inputs,
    feature_folder,
    fix_validation,
    input_shape,
    readable_images,
    report_unreadable,
    write_readable_images,
)
from imcap_ray.distributed.training.training_plan import (
    PreparedTraining,
    count_captions,
    prepare_training,
    share_of_unknown_words,
)
from imcap_ray.distributed.training.worker_group import run_workers, watch_room
from imcap_ray.errors import ImcapError
from imcap_ray.models.decoders import build_decoder
from imcap_ray.models.encoder_weights import FINETUNED
from imcap_ray.models.model_folder import ModelFolder, ModelSettings, save_model_folder
from imcap_ray.models.model_weights import select_tensors
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.training_run import (
    CAPTIONS_FILE,
    RUN_FOLDER,
    SETTINGS_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    EpochMetrics,
    keep_alive,
    read_metrics,
    recorded_end,
    write_metrics,
)
from imcap_ray.text.vocabulary import Vocabulary
from imcap_ray.training.experiment_trackers import Trackers, tracking
from imcap_ray.training.loop import Phase, StoppedError
from imcap_ray.training.model_card import write_card
from imcap_ray.training.phases import next_phase, num_epochs, phases, reads_pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """The result of a training."""

    model: str
    metrics: EpochMetrics
    """Metrics of the epoch that was kept, on the validation split."""
    num_epochs: int
    seconds: float


def train(
    config: TrainingRunConfig,
    resources: ResourcesConfig,
    *,
    data: CaptionedImages,
    cluster: ClusterResources,
    reporter: ProgressReporter | None = None,
) -> TrainingResult:
    """Train a decoder on the data set's training split and write the model folder.

    An interrupted training resumes from its newest complete checkpoint when it is called again with the same config.

    Args:
        data: the data set of the config, see `load_data`.
        reporter: None: lines are printed to stdout.

    Raises:
        InputError: something does not fit, found before work began.
        ImcapError: the training failed; the same call resumes after its last epoch, or the message says what to do.
    """
    start = time.time()
    prepared = prepare_training(config, resources, data=data, cluster=cluster)
    if prepared.workers.gpus:
        require_gpus(prepared.workers.gpus)
    training = _Training.begin(prepared, cluster, reporter or ProgressReporter(print))
    with recorded_end(training.lease):
        caches = training.cache_features()
        training.write_inputs(caches)
        training.run_phases(caches)
        best, newest = choose_best(training.checkpoints, report=training.report)
        training.save_model(best, newest, caches)
        training.leave()
    seconds = time.time() - start
    return TrainingResult(model=prepared.model, metrics=best.history[-1], num_epochs=newest.epoch, seconds=seconds)


@dataclass(slots=True, kw_only=True)
class _Training:
    """A training that has acquired the lease on its work folder."""

    prepared: PreparedTraining
    cluster: ClusterResources
    reporter: ProgressReporter
    lease: Lease
    history: list[EpochMetrics] = field(default_factory=list)
    feature_folders: list[FeatureFolder] = field(default_factory=list)
    """Folders of cached features, which have to be kept alive."""
    train_images: pa.Table = field(default_factory=DATASET_SCHEMA.empty_table)
    """The training images that can be read; known when their features are cached."""

    @classmethod
    def begin(cls, prepared: PreparedTraining, cluster: ClusterResources, reporter: ProgressReporter) -> _Training:
        """Acquire the lease, clean up what an earlier call left, and read its history."""
        work = prepared.work
        lease = Lease.acquire(work)  # first of all, so that an older run of the same training writes no more
        training = cls(prepared=prepared, cluster=cluster, reporter=reporter, lease=lease)
        storage.remove_temporary(work)
        storage.write_bytes(storage.join(work, SETTINGS_FILE), json.dumps(prepared.settings, indent=2).encode())
        for note in prepared.data.notes:
            reporter.report(f"{prepared.data.location}: {note}")
        checkpoint = training.recover()
        training.history = checkpoint.history if checkpoint else []
        vocabulary = storage.join(work, VOCABULARY_FILE)
        if training.history and storage.exists(vocabulary):
            # The vocabulary that the weights were trained with: an earlier version may have kept other words.
            training.prepared = replace(prepared, vocabulary=Vocabulary.from_json(storage.read_bytes(vocabulary)))
        write_metrics(work, training.history)
        return training

    @property
    def work(self) -> str:
        """The work folder."""
        return self.prepared.work

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.prepared.recipe

    @property
    def checkpoints(self) -> str:
        """The folder of Ray Train's run."""
        return storage.join(self.work, RUN_FOLDER)

    @property
    def name(self) -> str:
        """The name of the model, without its folder."""
        return self.prepared.model.rstrip("/").rpartition("/")[2]

    def report(self, line: str) -> None:
        """Print a line."""
        self.reporter.report(line)

    def recover(self) -> EpochCheckpoint | None:
        """Clean up the checkpoints, see `checkpoints.recover`."""
        return recover(self.checkpoints, finished_epochs=len(read_metrics(self.work)), report=self.report)

    def cache_features(self) -> dict[str, FeatureCache]:
        """The cached features of both splits."""
        caches = {}
        with keep_alive(self.lease, self.feature_folders):
            for split in (TRAIN, VALIDATION):
                folder = feature_folder(self.prepared, split)
                self.feature_folders.append(folder)
                caches[split] = cache_split(
                    self.prepared,
                    split,
                    folder,
                    cluster=self.cluster,
                    reporter=self.reporter,
                    check=self.lease.require,
                )
        self.lease.require()
        report_unreadable(caches, self.reporter)
        if not self.history and not self.prepared.config.allow_unusable:
            require_readable(
                self.prepared.data.location,
                num_failed=sum(len(cache.failures) for cache in caches.values()),
                num_images=sum(cache.num_images for cache in caches.values()),
            )
        self.train_images = readable_images(self.prepared.data, TRAIN, caches[TRAIN])
        return caches

    def write_inputs(self, caches: dict[str, FeatureCache]) -> None:
        """Write what the workers read besides the images: captions, vocabulary and the weights to start from."""
        prepared, vocabulary = self.prepared, self.prepared.vocabulary
        fix_validation(prepared.data, caches[VALIDATION], self.work, self.history, report=self.report)
        write_table(storage.join(self.work, CAPTIONS_FILE), prepared.data.table.cast(DATASET_SCHEMA))
        storage.write_bytes(storage.join(self.work, VOCABULARY_FILE), vocabulary.to_json().encode())
        if prepared.tokenizer_note:
            self.report(prepared.tokenizer_note)
        self.report(
            f"training {self.recipe.decoder.name} decoder, {len(vocabulary):,} tokens, on "
            f"{self.train_images.num_rows:,} images, {prepared.workers}, {num_epochs(self.recipe)} epochs at most"
        )
        if start_model := prepared.start_model:
            first_phase = next(iter(phases(self.recipe)))
            weights = safetensors.torch.save(self.weights_of(start_model))
            storage.write_bytes(start_weights_file(self.work, first_phase), weights)
        if self.history:
            self.report(f"resuming after epoch {len(self.history)}")
        elif start_model:
            share = share_of_unknown_words(self.train_images, start_model.vocabulary)
            self.report(
                f"starting from {start_model.location}; {share:.1%} of the words in the training captions are not in "
                f"its vocabulary; {len(vocabulary) - len(start_model.vocabulary):,} words are added to it"
            )
        if not self.history:
            for line in describe_images(prepared, caches):
                self.report(line)

    def weights_of(self, start_model: ModelFolder) -> dict[str, Tensor]:
        """The weights of the model that the training starts from, with rows for the words added to its vocabulary."""
        torch.manual_seed(self.prepared.config.seed)
        decoder = build_decoder(
            self.recipe.decoder,
            num_channels=self.prepared.encoder.num_channels,
            vocabulary_size=len(self.prepared.vocabulary),
        )
        return with_new_words(start_model.tensors, decoder)

    def run_phases(self, caches: dict[str, FeatureCache]) -> None:
        """Run the phases that are left, and log their epochs."""
        config = self.prepared.config
        parameters = {"recipe": config.recipe_name, "seed": config.seed, "data": self.prepared.data.location}
        with tracking(
            self.work,
            self.history,
            run_name=self.name,
            parameters=parameters | to_mapping(self.recipe),
            report=self.report,
        ) as trackers:
            while (phase := next_phase(self.history, self.recipe)) is not None:
                self.run_phase(phase, caches, trackers)
                trackers.log(self.history)

    def run_phase(self, phase: str, caches: dict[str, FeatureCache], trackers: Trackers) -> None:
        """Run a phase until its last epoch, or until a failure after at least one more epoch."""
        start_file = start_of_phase(phase, self.history, self.work, recipe=self.recipe, report=self.report)
        encoder, workers = self.prepared.encoder, self.prepared.workers
        if start_file:
            encoder = with_cnn_weights(encoder, read_weights(start_file))
        inputs: dict[str, Inputs] = {**caches}
        if reads_pixels(phase):
            inputs |= write_readable_images(self.prepared.data, caches, storage.join(self.work, "manifests"))
        threads = max(1, self.cluster.physical_cores // workers.max_count) if self.cluster.is_local else 1
        job = WorkerJob(
            lease=self.lease,
            phase=Phase(name=phase, recipe=self.recipe, seed=self.prepared.config.seed),
            encoder=ray.put(encoder),
            start_file=start_file,
            shapes={split: input_shape(inputs[split], encoder) for split in inputs},
            num_train_images=count_inputs(inputs[TRAIN]),
            threads=threads,
            needs_gpu=workers.gpus > 0,
        )
        watchers = [
            watch_epochs(self.lease, self.report, trackers),
            watch_room(workers, self.report),
        ]
        failure = None
        try:
            with keep_alive(self.lease, self.feature_folders):
                run_workers(job, inputs, encoder=encoder, workers=workers, watchers=watchers, report=self.report)
        except StoppedError:
            raise
        except ImcapError as error:
            failure = error
        self.lease.require()  # what looks unfinished may be what a run that has acquired the lease is writing
        checkpoint = self.recover()
        if failure:
            # Ray Train counts all failures since the start, which would end a long training on spot machines.
            if checkpoint is None or len(checkpoint.history) <= len(self.history):
                raise failure
            self.report(f"{failure}; resuming after epoch {len(checkpoint.history)}")
        elif checkpoint is None or next_phase(checkpoint.history, self.recipe) == phase:
            raise ImcapError(f"the training ended before its {phase} phase did; the same command resumes")
        self.history = checkpoint.history

    def save_model(self, best: EpochCheckpoint, newest: EpochCheckpoint, caches: dict[str, FeatureCache]) -> None:
        """Write the model folder with the weights of the best epoch."""
        prepared, config, recipe = self.prepared, self.prepared.config, self.recipe
        weights = read_weights(storage.join(best.location, WEIGHTS_FILE))
        kept = with_cnn_weights(prepared.encoder, weights)
        is_finetuned = kept is not prepared.encoder and prepared.encoder.weights.source != FINETUNED
        earlier_history = prepared.start_model.metrics.get("history", []) if prepared.start_model else []
        card = write_card(
            config,
            prepared.data,
            name=self.name,
            num_images=self.train_images.num_rows,
            num_captions=count_captions(self.train_images),
            vocabulary_size=len(prepared.vocabulary),
            encoder_weights=prepared.encoder.weights.source + ", fine-tuned" * is_finetuned,
            metrics=best.history[-1],
        )
        with keep_alive(self.lease, self.feature_folders):
            familiarity = learn_familiarity(
                prepared, caches, kept, cluster=self.cluster, reporter=self.reporter, check=self.lease.require
            )
        self.lease.require()
        save_model_folder(
            prepared.model,
            ModelSettings(
                encoder=recipe.encoder,
                encoder_weights=kept.weights,
                preprocessing=recipe.preprocessing,
                decoder=recipe.decoder,
                search=recipe.search,
            ),
            vocabulary=prepared.vocabulary,
            decoder_tensors=select_tensors("decoder.", weights),
            encoder_tensors=None if kept.weights.portable else kept.cnn.state_dict(),
            metrics={
                "validation": best.history[-1],
                "recipe": config.recipe_name,
                "seed": config.seed,
                # The epochs of the model that it started from come first; of several models, those of the first.
                "history": [*earlier_history, *newest.history],
            },
            card=card,
            familiarity=familiarity,
        )

    def leave(self) -> None:
        """Stop using the folders of cached features."""
        for folder in self.feature_folders:
            folder.leave()


def watch_epochs(lease: Lease, report: Callable[[str], None], trackers: Trackers) -> Callable[[], None]:
    """Return a function that reports and logs the epochs that the workers have finished since its last call."""
    num_reported = len(read_metrics(lease.work))
    num_logged: int | None = None

    def check() -> None:
        nonlocal num_reported, num_logged
        try:
            lease.require()  # otherwise the epochs are another run's
            rows = read_metrics(lease.work)
        except (OSError, ImcapError):  # the training does not depend on it, and the next call may reach the store
            return
        for row in rows[num_reported:]:
            report(
                f"epoch {row['epoch']}: {_describe_learning(row)}, validation CIDEr-D {row['cider_d']:.3f}, "
                f"BLEU-4 {100 * row['bleu_4']:.1f}, {row['seconds']:.0f} s"
            )
        num_reported = max(num_reported, len(rows))
        if num_logged != len(rows):
            num_logged = len(rows)
            trackers.log(rows)

    return check


def _describe_learning(metrics: EpochMetrics) -> str:
    if "train_reward" in metrics:
        return f"training reward {metrics['train_reward']:.3f}"
    return f"training loss {metrics['train_loss']:.3f}"
