"""The tables that these tests print."""

from tables import note as note
