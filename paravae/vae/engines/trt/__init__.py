"""TensorRT: the networks at one frame as ONNX graphs, engines built from them, and what runs those."""
