"""WUPS of DAQUAR."""
