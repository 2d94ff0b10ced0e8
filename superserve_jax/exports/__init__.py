"""The export directory: written after training, read by the server. Data only; nothing in it is executed."""

from superserve_jax.exports.directory import Model, Served, export, load, profile_path

__all__ = ["Model", "Served", "export", "load", "profile_path"]
