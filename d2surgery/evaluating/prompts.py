"""Short texts of several kinds on which models are compared: prose, dialogue, lists, code, numbers, other languages."""

PROMPTS = (
    "The river rises in the hills above the town and flows south through wide meadows before it reaches the sea.",
    "To make the soup, chop two onions and a carrot, fry them slowly in butter, then add a litre of hot water and",
    "Water boils at a lower temperature on a mountain because the pressure of the air is lower there, so eggs take",
    "Q: Which planet is the largest in the solar system?\nA: Jupiter.\nQ: Which planet is the closest to the sun?\nA:",
    "Please choose the correct answer: A plant needs light to\n\nAnswer1: grow Answer2: sleep\n\nThe correct answer is",
    '"Have you seen my keys?" she asked. "They were on the table this morning," he said, "next to the newspaper."',
    "def mean(numbers):\n    total = 0\n    for n in numbers:\n        total += n\n    return total / len(numbers)\n",
    "SELECT name, price FROM products WHERE price < 20 ORDER BY price;",
    '{"city": "Lisbon", "country": "Portugal", "coordinates": {"latitude": 38.7, "longitude": -9.1}}',
    "1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024,",
    "If a train travels 60 kilometres in 45 minutes, then its average speed is 80 kilometres per hour, because",
    "Shopping list:\n- bread\n- milk\n- six apples\n- a bag of rice\n-",
    "Dear Ms Tanaka,\n\nThank you for your letter of 3 March. We are glad to confirm your reservation for two nights",
    "Der Zug nach Wien fährt um acht Uhr von Gleis drei ab und kommt am frühen Nachmittag an.",
    "Le musée est ouvert tous les jours sauf le mardi, de dix heures à dix-huit heures.",
    "Once there was a clockmaker who lived at the edge of a forest. Every evening she wound the same old clock, until",
)
