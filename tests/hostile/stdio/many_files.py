number = 0
while True:
    open(f"/tmp/r1fast_hostile_{number}", "w").close()
    number += 1
