"""Words for a recipe and for what made a picture."""

from collections.abc import Collection

from ig_jax.diffusion.guidance import WHOLE, Rule
from ig_jax.diffusion.recipe import Recipe


def strength(rule: Rule) -> str:
    """The scale of a guidance and, unless it is on everywhere, its interval: "1.25 on (0, 0.7]"."""
    scale = rule.scale if isinstance(rule.scale, str) else f"{rule.scale:g}"
    low, high = rule.interval
    return scale if rule.off or rule.interval == WHOLE else f"{scale} on ({low:g}, {high:g}]"


def guidance(recipe: Recipe, without: Collection[str] = (), nothing: str = "no guidance") -> str:
    """The guidance of a recipe in a few words, as "IG 2 + CFG 1.25 on (0, 0.7]"; `without` leaves some rules out."""
    rules = [(name, rule) for name, rule in recipe.rules.items() if not rule.off and name not in without]
    return " + ".join(f"{name.upper()} {strength(rule)}" for name, rule in rules) or nothing


def caption(run: str, step: int, ema: str, digest: str, recipe: Recipe, seed: int, guided: str | None = None) -> str:
    """What made a picture, in one line; `guided` stands for the recipe's guidance where a picture shows several."""
    weights = ", ".join([run, f"step {step}", f"EMA {ema}", *([f"sha256 {digest[:8]}"] if digest else [])])
    shown = guidance(recipe) if guided is None else guided
    return "; ".join(filter(None, [weights, f"{recipe.solver.name}, {recipe.steps} steps, seed {seed}", shown]))


def of_metadata(metadata: dict, guided: str | None = None) -> str:
    """The caption of samples from their metadata."""
    made = metadata["checkpoint"]
    weights = made["experiment"], made["step"], made["ema"], made["digest"]
    return caption(*weights, Recipe.of(metadata["recipe"]), metadata["seed"], guided)
