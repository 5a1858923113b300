import socket

with socket.socket() as server:
    server.bind(("0.0.0.0", 0))
    server.listen()
    server.accept()
