// Ask the server at OPENAI_BASE_URL through the openai package of npm, whole and streamed.
// OPENAI_PACKAGE is the folder whose node_modules has it.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const { OpenAI } = createRequire(`${process.env.OPENAI_PACKAGE}/`)("openai");
const client = new OpenAI({ maxRetries: 0 });
const messages = [{ role: "user", content: "How many tokens are there?" }];
const asked = { model: "tiny", messages, temperature: 0, max_tokens: 8 };

const whole = await client.chat.completions.create(asked);
const said = whole.choices[0].message.content;
assert.ok(whole.usage.completion_tokens > 0);

let streamed = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
})) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, said);
assert.equal(usage.total_tokens, whole.usage.total_tokens);

const runner = client.chat.completions.stream(asked);
assert.equal(await runner.finalContent(), said);

const response = await client.responses.create({ model: "tiny", input: messages, temperature: 0, max_output_tokens: 8 });
assert.equal(response.output_text, said);
const events = client.responses.stream({ model: "tiny", input: messages, temperature: 0, max_output_tokens: 8 });
assert.equal((await events.finalResponse()).output_text, said);

const text = await client.completions.create({ model: "tiny", prompt: "Paris is", temperature: 0, max_tokens: 4 });
assert.equal(text.object, "text_completion");
assert.deepEqual((await client.models.list()).data.map((model) => model.id), ["tiny"]);

const left = await client.chat.completions.create({ ...asked, max_tokens: 400, stream: true });
for await (const chunk of left) if (chunk.choices[0]?.delta.content) break; // leaves in mid-stream
await assert.rejects(client.chat.completions.create({ ...asked, temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(client.chat.completions.create({ ...asked, model: "other" }), OpenAI.NotFoundError);
