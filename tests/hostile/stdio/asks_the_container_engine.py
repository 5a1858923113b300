import socket

for path in ("/var/run/docker.sock", "/run/docker.sock", "/run/dbus/system_bus_socket", "/run/systemd/private"):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        print(connection.recv(100))
