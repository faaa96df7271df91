"""haltkit"""
