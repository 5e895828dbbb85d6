"""What model.py reads, writes and runs on; nothing here imports anything of ours.

    files.py    what torch.save wrote, verified byte by byte; nothing runs (model.load_encoder)
    exports.py  TorchScript, torch.export and ONNX, written and compared (model.export_torchscript)
    machine.py  allocator, device, precision, versions (model.choose_device)

Every program needs this folder. A model.py copied without it trains, and saves and loads our own
encoder files, with torch's own checks; foreign checkpoints, exports and choose_device want it.
"""
