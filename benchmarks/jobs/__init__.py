"""What jobs of many ranks cost: the store that they meet at, the folder that they write to, ranks against threads.

Each is a program that prints a Markdown table and keeps what it measured: `store_load`, `file_operations`, `throughput`.
"""
