"""What tests share: networks, settings, the command line, a store."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
