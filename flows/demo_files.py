"""Where the demo's specification lies, and what it needs to be told."""

from pathlib import Path


def demo_spec() -> Path:
    """The demo's YAML, in the installed package or in the checkout."""
    here = Path(__file__).parent
    packaged = here / "configs" / "demo.yaml"
    return packaged if packaged.exists() else here.parent / "configs" / "demo.yaml"


def demo_settings(world: Path) -> list[str]:
    """Where the demo's YAML finds its data and base model."""
    return [f"world={world}"]
