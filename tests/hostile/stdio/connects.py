import socket

for address in (("127.0.0.1", 22), ("1.1.1.1", 53), ("localhost", 80)):
    with socket.create_connection(address, timeout=1) as connection:
        print(connection.recv(100))
