"""The texts that built-in prompts ask to work on, by slot. Texts have slots of their own; see forms.py."""

from __future__ import annotations

from typing import Final

TEXTS: Final = {
    "passage": (
        "The old mill by the river had stood empty for {12..60} years when {name} bought it. The roof leaked, the "
        "floor was rotten, and bats lived in the attic. Three summers later it was a bakery, and people from the "
        "next village came on foot for its rye bread.",
        "Sleep is not a waste of time. While we sleep the brain sorts what it has learned during the day, and the "
        "body repairs its muscles. Adults need seven to nine hours. Those who sleep less than {4..6} hours for weeks "
        "are ill more often, and they make more mistakes at work.",
        "The city council of {town} voted on {day} to close the main street to cars. Shop owners fear to lose "
        "customers, while families welcome the plan. A trial of {2..9} months begins in {month}. After that the "
        "council will count visitors and decide again.",
        "A battery stores energy in chemical form. When it is connected, electrons move from one side to the other "
        "through the wire, and ions move inside. When all of the material has reacted, the battery is empty. In some "
        "types the reaction can be reversed by charging.",
        "{name} started to run at the age of {40..70}. At first it was only around the block. A year later it was "
        'ten kilometers, and the doctor could not believe the numbers. "I am not fast," says {name}, "but I am '
        'outside every single day, and that is what counts."',
        "Octopuses have three hearts and blue blood. They can change the color and the texture of their skin within "
        "a second. In aquariums they have been seen to open jars, to squirt water at lamps, and to leave their tank "
        "at night in order to eat the fish next door.",
        "In the year {1850..1920} a fire destroyed half of the harbor. The wooden warehouses burned for two days. "
        "When the merchants built them anew they used brick and iron, and they dug a canal so that water was always "
        "near. The canal is still there, and today tourists row on it.",
        "Our company will move to a new office in {month}. The building has {3..12} floors, a kitchen on each of "
        "them, and no fixed desks. Everyone gets a locker. Please take your personal things home by {day} and label "
        "your boxes with your name and department.",
        "Coffee was first grown in Ethiopia and traded through Yemen. By the sixteenth century there were coffee "
        "houses in Cairo and Istanbul, where people met to talk, play chess and hear the news. Some rulers tried to "
        "forbid it, because they were afraid of what was said there.",
        "A study with {200..900} students compared two ways to learn. One group read a text four times. The other "
        "read it once and then tried to recall it three times. A week later the second group remembered about half "
        "more. Yet most students believed that rereading works better.",
        "The desert is not empty. Under the sand, seeds wait for years. When rain falls at last, the ground is "
        "covered with flowers within {5..20} days. Insects hatch, birds arrive, and everything hurries, since a "
        "month later the land will be brown again.",
        "Dear {name}, thank you for the book. I read it in two evenings and lent it to my {relative}, who has not "
        "given it back. The garden is full of weeds, and the {animal} next door keep us awake. Come and visit us in "
        "{month}, we have a spare room now. Yours, {name}",
        "Inflation means that prices rise on average, so that money buys less. A little of it is thought to be "
        "harmless. When it is high, savings lose value and wages have to be negotiated again and again. Central "
        "banks raise interest rates against it, which makes loans dear.",
        "The team from {town} won the final {2..5} to 1. In the first half they hardly touched the ball. After the "
        "break {name} scored twice within four minutes, and the crowd could be heard across the river. The coach "
        "spoke of luck; the newspapers spoke of a miracle.",
        "Bridges are tested before they are opened. Engineers drive heavy trucks onto them and measure how far they "
        "bend. For a bridge of {100..900} meters a few centimeters are normal. If the bridge does not return to its "
        "old shape when the trucks leave, something is wrong.",
        'When {name} opened the letter, the kitchen went quiet. It was only one line long: "The house is yours if '
        "you can find the key.\" Nobody in the family had spoken of the house since grandfather's death, and nobody "
        "knew where the key might be.",
        "Plants make sugar from light, water and carbon dioxide. They do this in small green bodies within their "
        "cells. Oxygen is what they give off. Without it neither {animal} nor people could breathe. A single large "
        "tree makes enough oxygen for about four people.",
        "To reset the device, hold the power button for {5..20} seconds until the lamp blinks. Release it and wait "
        "for two minutes. Do not unplug the cable. If the lamp stays red, press the button again. All of your "
        "settings will be lost; your pictures will be kept.",
        "The museum of {town} shows {20..90} paintings by women who were almost forgotten. Some of them signed with "
        "the names of their brothers. The exhibition is open until {day}, {3..28} {month}. Entry is free for "
        "students, and there are guided tours at noon.",
        "More and more people work from home. They save the way to the office and can be there when the children "
        "come from school. But many of them say that they miss their colleagues, and that work never ends. Some "
        "companies now ask for {2..4} days a week in the office.",
        "Glass is made of sand, soda and lime, which are melted at about {1400..1600} degrees. A worker takes a drop "
        "with a long pipe and blows it up. Within half a minute it has to have its shape. It must then cool for "
        "hours, or it would crack.",
        'Once there was a fox who was tired of being called clever. "I want to be called kind," he told the owl. '
        '"Then stop talking," said the owl, "and carry the hedgehog over the road." The fox did so. The hedgehog '
        'said: "How clever of you!"',
        "The library lends more than books. For {2..9} dollars a year you can take home a drill, a sewing machine, a "
        'projector or a tent. Last year the drill was out for {100..300} days. "Nobody needs a drill," says {name}, '
        'who works there, "what people need is a hole."',
        "Vaccines show the body a harmless part of a germ. The immune system learns what it looks like and keeps "
        "cells that remember it. When the real germ comes, these cells multiply within days. Some vaccines last for "
        "life; others have to be given again after {2..10} years.",
        "Last {day} our flight to {town} was cancelled at midnight. There was one employee for {100..300} "
        "passengers. We slept on the floor, got no water, and reached our hotel {20..40} hours late. We ask for a "
        "refund of the first two nights and for the compensation that the law grants.",
        "The word robot comes from a Czech play of 1920. In it machines that look like people do all the work, until "
        "they refuse. Real robots came much later, and they look like arms. They weld cars, pack boxes, and milk "
        "cows, and they still find it hard to fold a towel.",
        "The price of {food} rose by {5..60} percent this year. Farmers name three reasons: a dry spring, expensive "
        "fertilizer, and a lack of workers at harvest. Some shops sell smaller packs now. The ministry expects that "
        "prices will fall again in {month}.",
        "Memory is not a film that we play back. Each time we remember, we build the scene anew, and what we heard "
        "since then finds its way in. Two people who saw the same accident may tell two stories, and both are sure "
        "that they tell the truth.",
        "Every spring the people of the valley drive their {animal} up to the high meadows. The way takes {2..6} "
        "days. The oldest animal goes first and wears flowers. In autumn they come back, and there is a feast with "
        "music, cheese, and far too much to drink.",
        "Ice floats because it is lighter than water. That is rare; most things shrink when they freeze. If ice "
        "sank, lakes would freeze from the bottom up, and the fish would die. So the winter life of a pond depends "
        "on a strange property of a very common substance.",
        "I have used this for {2..12} weeks now. It is light, quick to set up, and looks good on the table. The "
        "manual is a joke, and the cable is too short. My {relative} broke the lid on the second day; a new one came "
        "within the week, free of charge. All in all I would buy it again.",
        "Minutes of {day}: {name} reported that sales are up by {3..30} percent. {name} asked for two more people in "
        "support, as customers wait too long. The new web page is late by {2..9} weeks. It was agreed to drop the "
        "video. The next meeting is at nine on {day}.",
    ),
    "sentence": (
        "The meeting was moved to {day} because {name} is ill.", "I really like {} and you should too.",
        "We ran out of {food} again.", "The children played in the garden until it got dark.",
        "{name} bought {thing} and regretted it at once.", "My {relative} lives in {town} and works as {job}.",
        "It will rain all week, so bring your boots.", "You have to send the form by {day}.",
        "The train to {town} leaves at {2..11} o'clock.", "Nobody told me that the shop closes in {month}.",
        "I can't come to {event}, sorry.", "Reading about {} has changed my life.",
        "Our new neighbor has {2..9} {animal}.", "This report is way too long and kind of boring.",
        "Give me the file now, I have been waiting for hours.", "The food was cold and the waiter was rude.",
        "Time flies when you talk about {}.", "If I had more money, I would travel to {country}.",
        "The results show that {} is less common than we thought.", "She opened the window and listened to the sea.",
        "He forgot the key, so we had to wait outside for {2..5} hours.",
        "There is nothing better than a bowl of {dish} on a cold day.", "Hey, can you fix my computer?",
        "{name} told us a story about {}.", "The company will not pay for {thing}.",
        "Don't forget to feed the {animal} before you leave.", "It's not my job to clean up after you.",
        "Learning {skill} takes patience and a good teacher.", "We are happy to announce {event} on {day}.",
        "The road to {place} is closed.",
    ),
    "wrong": (
        "She dont like {food} because their too sweet.", "I has been living in {town} since {2..9} years.",
        "Me and {name} was late for {event}.", "He go to work by bus every days.",
        "Their going to buy {thing} tomorow.", "Its a beautifull day, is'nt it?", "I could of helped you with {}.",
        "The informations about {} is not correct.", "Yesterday we have seen much {animal} in the park.",
        "Who's book is this, your's or {name}s?", "If I would have time, I will learn {skill}.",
        "There is many reason to like {}.", "The team are more better then last year.",
        "I am agree with {name} about {}.", "She said me that she can not came on {day}.",
        "He didnt knew how to {task}.", "Your the best freind I ever had {name}.",
        "Most of peoples like {dish} very much.", "Can you borrow me {thing} untill {day}?",
        "I look forward to hear from you soon about {event}.", "We was waiting since two hours in {place}.",
        "The childs plays with they're toys.", "How it works {}?", "Less people then expected has came to {event}.",
        "{name} is working like {job} in {town}.",
    ),
    "opening": (
        "It was the last day of {month}, and {name} had still not found the letter.",
        "The door at the end of the hall had never been open before.",
        "Once upon a time there lived {character} in {town}.", '"You are late," said {character}, without looking up.',
        "Nobody believed {name} when the lights went out over {place}.",
        "The first thing that I noticed about {thing} was the smell.",
        "When the ship left the harbor, {name} was hiding between boxes of {food}.",
        "I had always thought that {} was boring, until that {day}.",
        "There are two rules in our village: never go out in {month}, and never talk about {animal}.",
        "The phone rang. It was {character}.", "{name} counted the coins again. {3..60}. Not enough.",
        "On the morning of {event} it began to snow.", "Deep under {town} there is a room that is on no map.",
        "The robot looked at the {food} and asked: why?",
        "My {relative} was the only {genre} writer in {country}, and then came the war.",
        "At {2..11} in the night the {animal} began to speak.",
        "The map showed {place}, but something was wrong with it.", "{name} had been dead for {2..60} years.",
        "The spaceship had enough air for {2..30} days.", "In the attic we found {thing}, a note, and a key.",
    ),
    "start": (
        "The best thing about {} is", "If I could live in {place}, I", "When {name} opened the box,",
        "In the future, {} will", "I have never told anyone that {}", "The secret of good {dish} is",
        "Once I met {character} who", "The difference between {} and {} is", "Because of {},",
        "Three things that I learned from {} are", "A day without {} is like", "Scientists have found that {}",
        "Dear {name}, I am writing to you because", "To be {job}, one needs", "Everyone knows that {animal}",
    ),
    "comment": (
        "I waited {2..9} weeks for {thing} and it came broken.", "Best {dish} in {town}, and {name} was so friendly!",
        "Does {thing} come in green?", "It does what it should, nothing more.",
        "The app crashes each time I open it on {day}.", "My {relative} loves {thing}, thank you!", "Never again.",
        "Great price, but the sound is awful.", "How do I return {thing}?",
        "The room was clean, the bed was hard, and the view of {place} was lovely.",
        "Why was I charged twice for {thing}?",
        "I was not sure at first, but after {2..9} days I would not give it back.",
        "{name} from support solved it in minutes.", "The course on {} was a waste of money.",
        "The book about {} kept me up all night.", "I can't log in since {day}, please help.",
        "Too salty, too small, too expensive.", "Five stars for {event}!",
        "The driver was rude and {10..90} minutes late.", "It is okay for beginners in {skill}.",
        "What a surprise, {thing} is even better than in the picture.",
    ),
    "record": (
        "{name} from {town} ordered {2..40} boxes of {food} on {month} {2..28}, {1990..2024}.",
        "On {day} at {2..9} pm {name} will meet {name} in {town} to talk about {}.",
        "{name}, {18..80}, works as {job} and earns {1500..9000} dollars a month.",
        "The flight to {town} on {month} {2..28} costs {80..900} dollars and takes {2..14} hours.",
        "Invoice {1000..9999}: {thing}, {20..900} dollars, to be paid by {name} before {month} {2..28}.",
        "{name} was born in {country} in {1900..2005} and moved to {town} at {5..40}.",
        "Patient {name}, {20..90} years old, has had headaches for {2..20} days and takes {2..4} pills a day.",
        "{event} takes place in {town} on {day}; {name} brings {food}, {name} brings {thing}.",
        "In {1950..2020} the company of {name} and {name} sold {200..9000} units in {country}.",
        "Call {name} at 555-{1000..9999} about {thing} before {day}.",
        "The concert of {month} {2..28} in {town} was seen by {200..9000} people; tickets were {10..90} dollars.",
        "{name} teaches {skill} on {day} and {day}, {name} on {day}.",
    ),
    "trouble": (
        "I can't sleep before {event}.", "My neighbor plays loud music every {day}.",
        "I argued with my {relative} about {}.", "I always put things off.", "I lost my job as {job}.",
        "My boss never listens to me.", "I spend too much money on {thing}.", "My friend {name} forgot my birthday.",
        "I am afraid of {animal}.", "My {relative} does not talk to me anymore.",
        "I feel lonely since I moved to {town}.", "I have an exam about {} in {2..9} days and have not begun.",
        "I burned the {dish}, and the guests come in {10..90} minutes.", "My roommate eats my {food}.",
        "I don't know what to study.", "I get nervous when I speak about {}.",
        "I want to quit {skill}, but I have paid for a year.", "My phone fell into the water.",
        "I said yes to {event}, but I don't want to go.", "My child refuses to eat {food}.", "I am tired all day.",
        "I forgot {name}'s name.", "I can't decide between {country} and {country}.", "My laptop is slow.",
        "I found a wallet with {50..900} dollars.", "A colleague takes credit for my work on {}.",
        "I look at my phone too much.", "I can't afford {thing}.", "My plants keep dying.",
        "I promised {name} to help with {event}, and now I am ill.",
        "My {relative} wants to become {job}, and I am worried.",
    ),
    "ending": (
        "and that was that.", "nobody ever knew.", "the lights went on again.", "she smiled and closed the door.",
        "it was only a dream.", "they never came back.", "he had been right all along.", "and the sea was calm.",
        "then the phone rang.", "we were home.", "it began to rain.", "the cat had known it from the start.",
    ),
    "code": (
        "def mean(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n"
        "    return total / len(number)",
        "def fact(n):\n    return n * fact(n - 1)", "for i in range(1, n):\n    if i % 2 = 0:\n        print(i)",
        "def add(item, items=[]):\n    items.append(item)\n    return items",
        "function sum(list) {\n  let total;\n  for (const x of list) total += x;\n  return total;\n}",
        "def find(words, word):\n    for i in range(len(words)):\n        if words[i] == word:\n"
        "            return i\n        else:\n            return -1",
        "while n != 1:\n    n = n / 2 if n % 2 == 0 else 3 * n + 1\n    print(n)",
        "SELECT name, COUNT(*) FROM orders WHERE COUNT(*) > {2..9} GROUP BY name;",
        "def last(items):\n    return items[len(items)]",
        "int max(int a, int b) {\n    if (a > b)\n        return a;\n    return a;\n}",
        "def is_prime(n):\n    for d in range(2, n):\n        if n % d == 0:\n            return False\n"
        "        return True",
        "names = ['Ann', 'Bob']\nfor name in names:\n    names.remove(name)\nprint(names)",
        "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)",
        "const button = document.getElementById('save');\nbutton.onclick = save();",
        "def swap(a, b):\n    a = b\n    b = a\n    return a, b",
        "seen = {}\nfor word in text.split():\n    seen[word] += 1", "for f in $(ls *.txt); do\n  mv $f $f.bak\ndone",
        "def count(text):\n    return sum(1 for c in text if c in 'aeiou')",
        "with open('data.csv') as file:\n    rows = [line.split(',') for line in file]\n"
        "print(sum(int(row[{1..9}]) for row in rows))",
        "def bubble(a):\n    for i in range(len(a)):\n        for j in range(len(a) - 1):\n"
        "            if a[j] > a[j + 1]:\n                a[j], a[j + 1] = a[j + 1], a[j]",
        "x = input('A number: ')\nprint(x + {2..99})",
        "if (age >= 18) {\n  console.log('adult')\n} else if (age > {19..60}) {\n  console.log('older')\n}",
        "matrix = [[0] * {2..9}] * {2..9}\nmatrix[0][0] = 1\nprint(matrix)",
        "try:\n    value = int(text)\nexcept:\n    pass\nprint(value)",
    ),
}  # fmt: skip
