"""PyTorch to ONNX with Q/DQ, in the form that each engine wants; knows no runtime."""
