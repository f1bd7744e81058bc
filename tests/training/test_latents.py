"""Training on latents as they lie on disk: what the config leaves open, its checkpoints, and previews."""

import dataclasses

import latent_shards
import numpy as np
import pytest
import tiny_checkpoint as tiny
import toy
from latent_folders import LATENTS
from refusal import refused

from ig_jax.base.schema import bind
from ig_jax.checkpoints.steps import stored_meta
from ig_jax.config.experiment import Experiment
from ig_jax.data.formats.ldit import read_scaling
from ig_jax.models.latents import SD_VAE_SCALING, LatentScaling
from ig_jax.training.loop import train
from ig_jax.training.workdir import read_metrics


def experiment(config, folder, steps=2, **changes):
    """A config of ImageNet with another folder, a small network of the latents' shape, and two steps."""
    found = toy.load_config(config)
    found.model.update(depth=2, width=32, num_heads=2, inter_depth=(1,), dtype="float32", remat="none")
    found.optimizer.accumulate = 1
    found.data.update(folder=str(folder), batch_size=8)
    found.run.update(steps=steps, log_every=1, checkpoint_every=1)
    found.mesh.fsdp_up_to = 1
    found.update_from_flattened_dict(changes)
    return bind(Experiment, found)


def losses(workdir):
    return [line["loss/total"] for line in read_metrics(workdir)]


def test_a_folder_of_repa_trains_and_its_checkpoint_says_what_it_was_trained_on(tmp_path, capfd):
    changes = {"data.source": "repa", "model.num_classes": 5}
    train(experiment("sit_imagenet256", LATENTS / "repa", **changes), str(tmp_path))
    stored = bind(Experiment, stored_meta(tmp_path)["config"])
    assert (stored.data.holds, stored.data.dtype, stored.data.mirrored) == ("moments", "float32", False)
    assert stored.latents == SD_VAE_SCALING
    printed = capfd.readouterr()
    assert "5; 2 without images: 3, 4" in printed.out and "data_wait" in printed.err
    # The same command goes on.
    train(experiment("sit_imagenet256", LATENTS / "repa", steps=3, **changes), str(tmp_path))
    assert len(losses(tmp_path)) == 3 and np.isfinite(losses(tmp_path)).all()


def test_statistics_next_to_the_shards_go_into_the_checkpoint(tmp_path):
    changes = {"model.channels": 8, "latents.shift": (0.0,) * 8, "latents.scale": (1.0,) * 8}
    folder = LATENTS / "lightningdit"
    e = experiment("lightningdit_imagenet256", folder, 1, **changes, **{"latents.name": "va_vae_f16d8"})
    train(e, str(tmp_path))
    stored = bind(Experiment, stored_meta(tmp_path)["config"])
    assert stored.latents == read_scaling(folder / "imagenet_train_256/latents_stats.pt", 8)
    assert stored.latents.scale != e.latents.scale
    assert (stored.data.holds, stored.data.mirrored) == ("latents", True)


def test_the_same_numbers_train_alike_in_every_form(tmp_path, monkeypatch):
    """REPA's (C, h, w) and our (h, w, C), both without mirror images, give the same losses."""
    source = experiment("sit_imagenet256", LATENTS / "repa", **{"data.source": "repa"}).open_split("train")
    batch = source.gather(np.arange(12))
    moments = np.moveaxis(batch["moments"], 1, -1)
    arrays = {"moments": moments}
    latent_shards.write(
        tmp_path / "shards", side=32, flip="none", classes=1000, lengths=(5, 7), given=(arrays, batch["label"])
    )
    for name, folder, form in (("a", LATENTS / "repa", "repa"), ("b", tmp_path / "shards", "auto")):
        train(experiment("sit_imagenet256", folder, **{"data.source": form}), str(tmp_path / name))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_run_needs_a_folder_and_previews_of_latents_an_autoencoder(tmp_path):
    with refused("config.data.folder", "", fix="--config.data.folder=DIR"):
        train(experiment("dit_imagenet256", ""), str(tmp_path))
    with refused("config.run.preview_images", 4, fix="set run.autoencoder"):
        experiment("dit_imagenet256", "", **{"run.preview_images": 4})
    with refused("data image shape", (32, 32, 4), expected="(64, 64, 4)"):
        found = experiment("sit_imagenet256", LATENTS / "repa", **{"data.source": "repa", "model.input_size": 64})
        train(found, str(tmp_path))


def test_a_checkpoint_of_other_statistics_is_not_resumed_from(tmp_path):
    common = {"data.source": "repa", "model.num_classes": 5}
    train(experiment("sit_imagenet256", LATENTS / "repa", 1, **common), str(tmp_path))
    other = LatentScaling("sd_vae", (0.0,) * 4, (0.2,) * 4, "sit")
    changed = experiment("sit_imagenet256", LATENTS / "repa", 2, **common, **{"latents.scale": other.scale})
    with pytest.raises(ValueError, match="latents"):
        train(changed, str(tmp_path))


def test_fine_tuning_takes_latents_in_another_form(tmp_path):
    e = tiny.experiment(channels=4)  # of float32 latents, without mirror images
    tiny.write(tmp_path / "run", dataclasses.replace(e, latents=SD_VAE_SCALING))
    latent_shards.write(tmp_path / "shards", dtype="bfloat16")
    found = toy.load_config("finetune", str(tmp_path / "run"))
    found.data.update(source="auto", folder=str(tmp_path / "shards"))
    spec = bind(Experiment, found).open_split("train").spec
    assert (spec.holds, spec.dtype, spec.mirrored) == ("moments", "bfloat16", True)
    found.data.folder = str(LATENTS / "lightningdit")
    with refused("data image shape", (16, 16, 8)):
        bind(Experiment, found).open_split("train")
