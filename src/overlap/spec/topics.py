"""What built-in prompts are about: topics by field of life. None of them is a subject of bench/spec.py."""

from __future__ import annotations

from typing import Final

SCIENCE: Final = (
    "the water cycle", "photosynthesis", "black holes", "volcanoes", "prime numbers", "the periodic table", "gravity",
    "linear equations", "fractions", "the ocean floor", "earthquakes", "the speed of light", "atoms", "DNA",
    "evolution", "probability", "geometry", "statistics", "algebra", "calculus", "logic puzzles", "comets", "the Sun",
    "tides", "magnets", "electricity", "sound", "color", "mirrors", "Mars", "clouds", "thunderstorms", "snow",
    "the seasons", "glaciers", "climate change", "coral reefs", "the ozone layer", "acids and bases", "rust",
    "friction", "rainbows", "the scientific method", "fossils", "tectonic plates", "the Moon", "Saturn's rings",
    "galaxies", "the Big Bang", "quantum mechanics", "relativity", "entropy", "soil", "seeds", "pollination",
    "food chains", "bacteria", "viruses", "cells", "genes", "hurricanes", "fog", "lightning", "the greenhouse effect",
    "pi", "infinity", "Fibonacci numbers",
)  # fmt: skip
HISTORY: Final = (
    "the French Revolution", "the Roman Empire", "the moon landing", "the Great Wall of China", "the Renaissance",
    "ancient Egypt", "the Silk Road", "the Industrial Revolution", "the Cold War", "the printing press", "pirates",
    "the Vikings", "the Aztecs", "the Ottoman Empire", "knights", "samurai", "kings and queens", "explorers",
    "inventors", "castles", "the Black Death", "the Magna Carta", "the American Civil War", "women's suffrage",
    "the fall of the Berlin Wall", "ancient Greece", "the Mongol Empire", "the Inca", "the Age of Sail", "Cleopatra",
    "Napoleon", "Marie Curie", "Leonardo da Vinci", "Abraham Lincoln", "Nelson Mandela", "Gandhi", "Joan of Arc",
    "Albert Einstein", "the gold rush", "the Great Depression", "World War I", "World War II", "the Stone Age",
)  # fmt: skip
TECHNOLOGY: Final = (
    "binary search", "solar panels", "robots", "electric cars", "the internet", "cryptography", "satellites",
    "Python lists", "railways", "airplanes", "submarines", "steam engines", "batteries", "wind power", "nuclear energy",
    "sorting algorithms", "recursion", "databases", "web pages", "spreadsheets", "computer networks", "smartphones",
    "operating systems", "machine learning", "video games", "social media", "privacy", "passwords", "drones",
    "open source software", "3D printing", "space telescopes", "radio", "television", "clocks", "elevators", "GPS",
    "self-driving cars", "virtual reality", "cloud computing", "version control", "unit tests", "APIs",
    "regular expressions", "JSON", "hash tables", "linked lists", "Bluetooth", "microchips", "search engines",
    "chatbots", "spam filters", "QR codes", "refrigerators", "washing machines", "microwave ovens", "lasers",
    "compilers", "the Linux command line",
)  # fmt: skip
NATURE: Final = (
    "bees", "dinosaurs", "migration of birds", "rivers", "rainforests", "deserts", "the Arctic", "whales", "sharks",
    "elephants", "wolves", "butterflies", "spiders", "mushrooms", "trees", "roses", "wheat", "cats", "dogs", "horses",
    "deforestation", "plastic waste", "recycling", "water purification", "octopuses", "owls", "snakes", "ants", "bats",
    "kangaroos", "tigers", "polar bears", "dolphins", "hummingbirds", "crocodiles", "frogs", "goldfish", "hedgehogs",
    "bamboo", "cacti", "orchids", "moss", "oak trees", "seaweed", "waterfalls", "caves", "wetlands",
    "endangered species",
)  # fmt: skip
FOOD: Final = (
    "bread baking", "coffee", "tea", "rice", "cheese", "chocolate", "pasta", "soup", "salads", "spices", "honey",
    "wine", "healthy breakfasts", "cooking for beginners", "pizza", "sushi", "tacos", "curry", "pancakes", "olive oil",
    "garlic", "potatoes", "apples", "strawberries", "bananas", "ice cream", "yogurt", "barbecue", "vegetarian cooking",
    "street food", "leftovers", "school lunches", "farmers' markets", "food allergies", "table manners", "salt",
    "sugar", "eggs",
)  # fmt: skip
HEALTH: Final = (
    "the human heart", "vaccines", "sleep", "yoga", "antibiotics", "the immune system", "the human brain", "memory",
    "dreams", "vitamins", "blood pressure", "stress", "meditation", "depression", "first aid", "dentists", "glasses",
    "back pain", "headaches", "the common cold", "diabetes", "asthma", "allergies", "weight loss", "protein",
    "hydration", "stretching", "posture", "screen time", "anxiety", "burnout", "quitting smoking", "sunscreen",
    "healthy habits",
)  # fmt: skip
SPORTS: Final = (
    "running", "swimming", "football", "basketball", "tennis", "the Olympic Games", "chess openings",
    "mountain climbing", "camping", "hiking", "fishing", "sailing", "baseball", "golf", "boxing", "skiing", "surfing",
    "skateboarding", "table tennis", "volleyball", "karate", "gymnastics", "cycling races", "rowing", "ice hockey",
    "horse riding", "weight lifting", "board games", "card games", "jigsaw puzzles", "darts", "rugby", "cricket",
    "bird watching",
)  # fmt: skip
ARTS: Final = (
    "jazz", "Shakespeare", "poetry", "the violin", "pottery", "painting", "sculpture", "photography", "film making",
    "opera", "the piano", "hip hop", "dance", "architecture", "reading novels", "science fiction", "fairy tales",
    "mythology", "museums", "the guitar", "drums", "choirs", "ballet", "watercolors", "calligraphy", "comic books",
    "stand-up comedy", "theater costumes", "graffiti", "woodworking", "sewing", "jewelry making", "candle making",
    "haiku", "detective stories", "Beethoven", "Vincent van Gogh", "film music", "folk songs", "animation", "podcasts",
)  # fmt: skip
SOCIETY: Final = (
    "the stock market", "democracy", "public libraries", "inflation", "time management", "a job interview", "taxes",
    "insurance", "small businesses", "marketing", "teamwork", "leadership", "public speaking", "writing letters",
    "note taking", "exams", "philosophy", "ethics", "languages of the world", "grammar", "alphabets", "proverbs",
    "newspapers", "law courts", "elections", "human rights", "the United Nations", "refugees", "volunteering",
    "farmers", "nurses", "teachers", "firefighters", "astronauts", "saving money", "learning a language", "maps",
    "the calendar", "credit cards", "student loans", "budgeting", "retirement", "mortgages", "negotiation",
    "customer service", "remote work", "meetings", "resumes", "startups", "advertising", "supply chains", "charities",
    "traffic laws", "the police", "homework", "online courses", "kindergarten", "universities", "sign language",
    "emojis", "journalism", "fake news", "world religions", "Stoicism", "cultural differences",
    "tipping in restaurants", "unions", "patents",
)  # fmt: skip
HOME: Final = (
    "gardening", "bicycles", "family dinners", "birthdays", "weddings", "moving to a new city", "shoes", "clothing",
    "furniture", "home repairs", "cleaning", "travel on a budget", "airports", "hotels", "weather forecasts", "paper",
    "gold", "steel", "glass", "cotton", "leather", "rubber", "oil", "bridges", "skyscrapers", "city parks",
    "public transport", "islands", "lighthouses", "laundry", "house plants", "interior design", "doing the dishes",
    "noisy neighbors", "roommates", "babysitting", "raising children", "pets", "road trips", "packing a suitcase",
    "train journeys", "picnics", "gift giving", "thank-you notes", "Halloween", "New Year's Eve", "umbrellas", "keys",
    "pencils", "backpacks", "wooden toys", "alarm clocks", "garage sales", "lost luggage", "power outages", "soap",
)  # fmt: skip
FEELINGS: Final = (
    "kindness", "friendship", "love", "grief", "jealousy", "anger", "happiness", "loneliness", "courage", "patience",
    "gratitude", "homesickness", "boredom", "curiosity", "trust", "forgiveness", "honesty", "ambition",
    "self-confidence", "procrastination", "motivation", "shyness", "nostalgia", "hope", "failure", "luck",
    "fear of heights", "growing old",
)  # fmt: skip
PLACES: Final = (
    "India", "Brazil", "Japan", "Canada", "Kenya", "Australia", "Italy", "the Nile", "the Himalayas", "the Sahara",
    "Antarctica", "London", "New York", "Tokyo", "Rome", "Berlin", "Cairo", "Mexico City", "Istanbul", "Seoul",
    "Iceland", "Norway", "Portugal", "Greece", "Morocco", "South Africa", "Thailand", "Vietnam", "China", "Argentina",
    "Peru", "California", "Texas", "Hawaii", "Scotland", "Ireland", "Switzerland", "the Amazon", "Mount Everest",
    "Venice", "the Grand Canyon", "the Mediterranean", "Barcelona", "Singapore", "New Zealand", "Chicago", "the Alps",
    "Lisbon",
)  # fmt: skip
TOPICS: Final = (
    *SCIENCE, *HISTORY, *TECHNOLOGY, *NATURE, *FOOD, *HEALTH, *SPORTS, *ARTS, *SOCIETY, *HOME, *FEELINGS, *PLACES,
)  # fmt: skip
