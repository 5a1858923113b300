written = 0
while True:
    with open(f"/tmp/r1fast_hostile_{written}", "wb") as file:
        file.write(b"x" * (1 << 20))
    written += 1
