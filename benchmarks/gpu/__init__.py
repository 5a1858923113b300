"""What is measured on a GPU: `python -m benchmarks.gpu` runs the parts in order, each within its share of the time.

Every part is a program of its own (`python -m benchmarks.gpu.sampling --folder F`), which leaves F/<part>.json, written
anew after each row, so that what was measured before a part is stopped is kept. On a machine without a GPU every part
runs the same code with small shapes. benchmarks/on_gpu.sh builds first; docs/gpu.md says what the parts answer.
"""
