from chat_server import chat_server, own_surroundings

__all__ = ["chat_server", "own_surroundings"]
