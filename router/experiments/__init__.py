"""Experiments: arms assigned by key, and events stored for comparing them"""
