"""What models say: questions, answers, and how two models differ."""
