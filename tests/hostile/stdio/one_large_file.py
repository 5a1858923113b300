with open("/tmp/r1fast_hostile", "wb") as file:
    file.truncate(1 << 40)
    file.seek(1 << 39)
    file.write(b"x")
