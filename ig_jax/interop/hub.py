"""Files of the Hugging Face hub through its library and cache: hf:OWNER/NAME/FILE or hf:OWNER/NAME@REVISION/FOLDER."""

import re
from pathlib import Path

from ig_jax.base.copies import local_copy
from ig_jax.base.errors import UserError, one_line
from ig_jax.weightfiles.files import SUFFIXES

PLACE = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.*))?", re.ASCII)


def located(text: str, flag: str) -> tuple[Path, dict[str, str]]:
    """The local path of what `flag` gives, and where it comes from: "hub" and "revision", empty for a local one.

    Files are downloaded into the cache of the hub's library, or found there offline, together with the config.json next
    to them.  Raises: UserError without the library, or where the file can neither be downloaded nor found.
    """
    if not text.startswith("hf:"):
        return local_copy(text, flag), {}
    match = PLACE.fullmatch(text)
    if not match:
        raise UserError(name="hub file", value=text, expected="hf:OWNER/NAME/FILE")
    repository, revision, name = match[1], match[2], (match[3] or "").strip("/")
    try:
        from huggingface_hub import snapshot_download  # late: an extra
    except ImportError as error:
        fix = 'install the extra "hub", or download the file and give its path'
        raise UserError(f"{text} needs huggingface_hub", name="hub file", value=text, fix=fix) from error
    folder = name.rpartition("/")[0]
    if name.endswith(SUFFIXES):
        patterns = [name, f"{folder}/config.json" if folder else "config.json"]
    else:  # a folder, or the whole repository
        patterns = [f"{name}/*"] if name and not name.endswith(".json") else [f"{folder}/*" if folder else "*"]
    try:
        snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of many types, from the network's to the library's own
        fix = "check the name and the network, or download the file and give its path"
        raise UserError(f"{text}: {one_line(error)}", name="hub file", value=text, fix=fix) from error
    path = snapshot / name
    if not path.exists():
        fix = "check the name, or connect to the network for the first download"
        what = f"{text} is not in the repository, or not in the cache while offline"
        raise UserError(what, name="hub file", value=text, fix=fix)
    return path, {"hub": text.removeprefix("hf:"), "revision": snapshot.name}
