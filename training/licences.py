"""Which installed distribution a file belongs to, and under which licence it is."""

import re
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

PERMISSIVE = re.compile(
    r"\b(0BSD|BSD|MIT|MIT-CMU|HPND|Apache|ISC|PSF|Python Software Foundation|Zlib|CC0|Unlicense"
    r"|public domain)\b",
    re.IGNORECASE,
)
RESTRICTED = re.compile(
    r"\w*GPL|General Public|MPL|Mozilla|EUPL|proprietary|non-?commercial|NVIDIA", re.IGNORECASE
)
# It frees what is linked with GCC's runtime, so a wheel that carries that library may be read.
RUNTIME_EXCEPTION = re.compile(r"GPL-3\.0-or-later WITH GCC-exception-3\.1", re.IGNORECASE)
PHRASES = {
    "Permission is hereby granted, free of charge": "MIT",
    "Redistribution and use in source and binary forms": "BSD",
    "Apache License": "Apache-2.0",
}


@dataclass(frozen=True)
class Owner:
    """A distribution: its name, version and stated licence."""

    name: str
    version: str
    licence: str

    @property
    def permissive(self) -> bool:
        """Whether the stated licence lets anyone use the source, with credit at most."""
        stated = RUNTIME_EXCEPTION.sub("", self.licence)
        return bool(PERMISSIVE.search(stated)) and not RESTRICTED.search(stated)


def owners(root: Path) -> dict[Path, Owner]:
    """The owner of each Python file that a distribution under `root` lists as its own."""
    found: dict[Path, Owner] = {}
    for distribution in distributions(path=[str(root)]):
        name = distribution.metadata["Name"] or "unnamed"
        owner = Owner(name, distribution.version, stated_licence(distribution))
        for file in distribution.files or []:
            if file.suffix == ".py":
                found[Path(str(distribution.locate_file(file))).resolve()] = owner
    return found


def stated_licence(distribution: Distribution) -> str:
    """The licence in one line: expression, classifiers, field, or told by the licence file."""
    metadata = distribution.metadata
    if metadata["License-Expression"]:
        return metadata["License-Expression"]
    classifiers = metadata.get_all("Classifier") or []
    licences = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License ::")]
    if licences:
        return "; ".join(sorted(set(licences)))
    field = (metadata["License"] or "").strip()
    if field and "\n" not in field and field.upper() != "UNKNOWN":
        return field
    texts = [field] + [
        Path(str(distribution.locate_file(file))).read_text(errors="replace")
        for file in distribution.files or []
        if re.match(r"(LICEN[CS]E|COPYING)", file.name, re.IGNORECASE) and file.suffix != ".py"
    ]
    names = {name for text in texts for phrase, name in PHRASES.items() if phrase in text}
    return "; ".join(sorted(names)) or "not stated"
