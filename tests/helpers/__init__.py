"""Helpers of several tests: networks, settings, the command line, stores."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
