// The openai package for JavaScript: plain and streamed chats, tools that it runs by itself, structured output, responses.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: process.env.KEY, maxRetries: 0 });
const model = "kevlar-demo";
const messages = [{ role: "user", content: "Say something" }];

const whole = await client.chat.completions.create({ model, messages });
assert.equal(whole.choices[0].message.content, "One moment.");
let text = "";
let usage;
const stream = await client.chat.completions.create({
  model, messages, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, "One moment.");
assert.deepEqual(usage, whole.usage);

const Event = z.object({ name: z.string(), day: z.number().int() });
const parsed = await client.chat.completions.parse({
  model, messages, response_format: zodResponseFormat(Event, "event"),
});
assert.deepEqual(parsed.choices[0].message.parsed, { name: "ball", day: 3 });

await assert.rejects(
  client.chat.completions.create({ model, messages: [{ role: "user", content: "word ".repeat(5000) }] }),
  { status: 400, code: "context_length_exceeded" },
);

const asked = [];
const tools = [{
  type: "function",
  function: {
    name: "get_weather",
    parse: JSON.parse,
    function: (given) => { asked.push(given); return "rain"; },
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}];
for (const streamed of [false, true]) {
  const runner = client.chat.completions.runTools({
    model, messages: [{ role: "user", content: "Weather?" }], tools, stream: streamed,
  });
  assert.equal(await runner.finalContent(), "It rains in Köln.");
}
assert.deepEqual(asked, [{ city: "Köln" }, { city: "Köln" }]);

const response = await client.responses.create({ model, input: "Say something" });
assert.equal(response.output_text, "One moment.");
const made = await client.responses.parse({ model, input: "x", text: { format: zodTextFormat(Event, "event") } });
assert.deepEqual(made.output_parsed, { name: "ball", day: 3 });
const events = client.responses.stream({
  model,
  input: "Weather?",
  tools: [{ type: "function", name: "get_weather", parameters: tools[0].function.parameters, strict: false }],
});
let grown = "";
for await (const event of events) {
  if (event.type === "response.function_call_arguments.delta") grown += event.delta;
}
const last = await events.finalResponse();
assert.deepEqual(JSON.parse(grown), { city: "Köln" });
assert.equal(last.output.at(-1).name, "get_weather");
console.log("ok");
