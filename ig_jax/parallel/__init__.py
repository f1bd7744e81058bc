"""Devices and processes: meshes, shardings, peers."""
