"""A case in plain numbers for the peer, which imports no JAX."""

from ig_jax.benchmarking.cases import Case
from ig_jax.errors import check
from ig_jax.models import cost


def check_comparable(case: Case, command: str) -> None:
    """Raise UserError unless the peer has the parts of this network and its recipe."""
    model, optimizer = case.model, case.optimizer.name
    parts = (model.norm, model.mlp, model.rope, model.qk_norm, model.adaln_shift, model.mlp_ratio, case.process.kind)
    check(parts == ("layernorm", "gelu", False, "none", True, 4.0, "linear"), "--peer", "diffusers",
          f"left out for {case.name}", "DiTTransformer2DModel has the parts of SiT alone: try --model=SiT-S/2")
    check(command != "sample" or case.sample.solver == "sde", "--solver", case.sample.solver, "sde with a peer")
    check(command != "train" or optimizer == "adamw", "optimizer.name", optimizer, "adamw with a peer")


def numbers(case: Case, command: str) -> dict:
    """Sizes, optimizer and solver of a case as JSON; latents are [B, C, H, W] there."""
    model, recipe = case.model, case.sample
    evaluations = recipe.evaluations_per_image(case.process.kind, model) if command == "sample" else None
    return {
        "model": dict(
            num_attention_heads=model.num_heads, attention_head_dim=model.width // model.num_heads,
            in_channels=model.channels, out_channels=model.channels, num_layers=model.depth,
            sample_size=model.input_size, patch_size=model.patch_size, num_embeds_ada_norm=model.num_classes,
        ),
        "dtype": model.dtype, "shape": (case.batch, model.channels, model.input_size, model.input_size),
        "null_label": model.num_classes, "label_drop": case.loss.label_drop, "ema": case.ema.decays[0],
        "optimizer": {name: getattr(case.optimizer, name)
                      for name in ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm")},
        "cfg_scale": float(recipe.cfg_scale) if recipe.guidance.use_cfg else 1.0,
        "rows": _rows(case) if command == "sample" else [],
        "evaluations": evaluations, "flops": _flops(case, command, evaluations),
    }


def _rows(case: Case) -> list[dict]:
    recipe = case.sample
    return [
        {"t": float(row.scalars["t"]), "x": float(row.scalars["x"]), "v": float(row.scalars["v"]),
         "noise": float(row.scalars.get("noise", 0.0)), "cfg": recipe.guidance.region(row.lookup[0]).cfg}
        for row in recipe.method.rows(case.process.kind, recipe.steps)
    ]


def _flops(case: Case, command: str, evaluations: float | None) -> float:
    """Our count without the intermediate heads."""
    model = case.model
    forward = 2 * (cost.forward_macs(model) - len(model.inter_depth) * cost.head_macs(model))
    return forward * case.batch * (3 if command == "train" else evaluations)
