held = []
while True:
    try:
        held.append(bytearray(64 << 20))
    except MemoryError:
        pass
